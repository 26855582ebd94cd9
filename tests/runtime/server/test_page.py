"""The page's chat at `/` in headless Chromium, with a real server and an engine whose model is a script."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect

from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.page import load_assets
from belle_compile.runtime.server.service import Service
from tests.runtime.server.browsing import Site, Visitor
from tests.runtime.server.page_visits import (
    answers,
    ask,
    browser,
    expect_answered,
    in_chromium,
    model,
    served,
    service,
    show_tab,
    site,
    visit,
    visitor,
)
from tests.runtime.server.serving import wait_until

__all__ = ["browser", "model", "served", "service", "site", "visit", "visitor"]  # fixtures


def test_files_come_with_strict_headers(service: Service) -> None:
    client = TestClient(create_app(service))
    kinds = {"index.html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for name in load_assets():
        path = "/" if name == "index.html" else f"/page/{name}"
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] == kinds.get(name) or kinds[name.rpartition(".")[2]]
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"if-none-match": f'"other", W/{response.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).headers["etag"] == response.headers["etag"]
    assert client.get("/page/nothing.js").status_code == client.get("/page/__init__.py").status_code == 404
    assert client.get("/page/index.html").status_code == 404, "its links are relative to /"


def test_files_name_no_other_origin_and_hold_nothing_inline() -> None:
    for name, asset in load_assets().items():
        text = asset.content.decode()
        assert set(re.findall(r"\w+://[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=.module. src=)|(inn|out)erHTML|\beval\b", text), name
        assert len(text.splitlines()) <= 500 or name.endswith("css")


@in_chromium
def test_an_answer_appears_while_it_is_generated(visitor: Visitor, site: Site) -> None:
    site.model.answer, site.model.hold_at = "hello world, hello there", 2
    page = visitor.page
    ask(page, "Hi")
    expect(answers(page)).to_contain_text("hello")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    assert page.locator(".answer .text").inner_text() != site.model.answer
    expect(page.locator("#announcer")).to_be_empty()  # screen readers hear the whole answer, once
    site.model.released.set()
    expect_answered(page)
    expect(page.locator(".answer .text")).to_have_text(site.model.answer)
    expect(page.get_by_role("status")).to_have_text(f"Answer: {site.model.answer}")
    expect(page.locator(".usage")).to_have_text(re.compile(r"\d+ tokens · [\d.k]+ tokens/s · first token [\d.]+ (ms|s)"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@in_chromium
@pytest.mark.parametrize("by", ["button", "key"])
def test_stopping_withdraws_the_request(visitor: Visitor, site: Site, by: str) -> None:
    before = site.engine.stats().cancellations
    site.model.answer, site.model.pause_s = "hello " * 850, 0.01
    page = visitor.page
    ask(page, "Hi")
    expect(answers(page)).to_contain_text("hello")
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".usage")).to_contain_text("stopped")
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    wait_until(lambda: site.engine.stats().cancellations > before and site.engine.stats().running == 0)
    site.model.answer = "Fine."
    ask(page, "Again")  # what came of the answer is part of the chat
    expect(answers(page).last).to_contain_text("Fine.")
    said = [message["role"] for message in visitor.body()["messages"]]
    assert said == ["user", "assistant", "user"] and visitor.body()["messages"][1]["content"].startswith("hello")


@in_chromium
def test_turns_carry_what_was_said_before(visitor: Visitor, site: Site) -> None:
    page = visitor.page
    ask(page, "你好")
    expect_answered(page)
    ask(page, "And now?")
    expect_answered(page, 2)
    asked = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello there."}]
    assert visitor.body()["messages"] == [*asked, {"role": "user", "content": "And now?"}]
    site.model.answer = "Another one."
    page.get_by_role("button", name="Try again").click()
    expect(answers(page).last).to_contain_text("Another one.")
    assert visitor.body()["messages"] == [*asked, {"role": "user", "content": "And now?"}]
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "From the start")
    expect_answered(page)
    assert visitor.body()["messages"] == [{"role": "user", "content": "From the start"}]


@in_chromium
def test_parameters_reach_the_request_and_are_kept(visitor: Visitor) -> None:
    page = visitor.page
    show_tab(page, "Parameters")
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
    expect(page.get_by_label("Max tokens")).to_have_attribute("placeholder", "900")
    entries = {
        "Temperature": 0.5, "Max tokens": 9, "Top p": 0.8, "Top k": 7, "Repetition penalty": 1.1, "Seed": 42,
        "Presence penalty": -0.5, "Frequency penalty": 0.25, "Cache salt": "mine", "System prompt": "Be brief.",
    }  # fmt: skip
    ask(page, "Before")
    expect_answered(page)
    assert set(visitor.body()) == {"model", "messages", "stream", "stream_options"}
    assert "cache-control" not in visitor.chats()[-1].headers
    for label, value in entries.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_label("Use the result cache").uncheck()
    page.reload()
    ask(page, "After")
    expect_answered(page)
    assert visitor.body() == {
        "model": "tiny", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "After"}],
        **{label.lower().replace(" ", "_"): value for label, value in entries.items() if label != "System prompt"},
    }  # fmt: skip
    assert visitor.chats()[-1].headers["cache-control"] == "no-cache, no-store"
    show_tab(page, "Parameters")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Use the result cache")).to_be_checked()
    ask(page, "Reset")
    expect_answered(page, 2)
    assert set(visitor.body()) == {"model", "messages", "stream", "stream_options"}


@in_chromium
def test_a_repeated_answer_comes_from_the_result_cache(visitor: Visitor) -> None:
    page = visitor.page
    show_tab(page, "Parameters")
    page.get_by_label("Seed").fill("7")
    for cached in (False, True):
        page.get_by_role("button", name="New chat").click()
        ask(page, "Twice")
        expect_answered(page)
        expect(answers(page)).to_contain_text("Hello there.")
        assert ("from the result cache" in page.locator(".usage").inner_text()) == cached
    show_tab(page, "Live")
    expect(page.get_by_role("img", name=re.compile("^Cache hits, .* result: now [1-9]"))).to_be_visible()


@in_chromium
def test_errors_name_the_field(visitor: Visitor, site: Site) -> None:
    page = visitor.page
    show_tab(page, "Parameters")
    page.get_by_label("Top p").fill("7")
    ask(page, "Hi")
    expect(page.locator(".answer .error")).to_contain_text("top_p")
    expect(page.get_by_label("Top p")).to_have_accessible_error_message(re.compile("top_p"))
    expect(page.get_by_role("status")).to_contain_text("top_p")
    assert [error for error in visitor.errors if "400" not in error] == []
    visitor.errors.clear()
    page.get_by_label("Top p").fill("0.7")
    expect(page.get_by_label("Top p")).not_to_have_attribute("aria-invalid", "true")
    page.get_by_label("Seed").fill("1.5")
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("Seed: ")
    page.get_by_role("button", name="Try again").click()
    assert len(visitor.chats()) == 1, "what is no whole number is not sent"
    page.get_by_label("Seed").fill("15")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_contain_text("Hello there.")
    expect(page.locator(".answer .error")).to_be_hidden()


@in_chromium
def test_what_a_model_writes_is_text(visitor: Visitor, site: Site) -> None:
    site.model.answer = "<img src=/x onerror=alert(1)>\n```js\n<b>1</b>\n```\n**so**"
    ask(visitor.page, "<i>Hi</i>")
    expect_answered(visitor.page)
    expect(visitor.page.locator(".answer pre code")).to_have_text("<b>1</b>")
    expect(visitor.page.locator(".answer .text p").first).to_have_text("<img src=/x onerror=alert(1)>")
    expect(visitor.page.locator(".question .text")).to_have_text("<i>Hi</i>")
    assert visitor.page.locator(".turns img, .turns b, .turns i").count() == 0


@in_chromium
def test_an_answer_can_be_copied(visit: Callable[..., Visitor], site: Site) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).open(site.url)
    for secure in (True, False):  # a page that came over plain HTTP from another host has no clipboard
        if not secure:
            page.evaluate("Object.defineProperty(navigator, 'clipboard', {get: () => undefined, configurable: true})")
        site.model.answer = f"Answer {secure}."
        ask(page, "Hi")
        expect(answers(page).last).to_contain_text(site.model.answer)
        page.get_by_role("button", name="Copy answer").last.click()
        expect(page.get_by_role("status")).to_have_text("Copied")
        if not secure:
            page.evaluate("delete navigator.clipboard")
        assert page.evaluate("navigator.clipboard.readText()") == site.model.answer


@in_chromium
def test_the_keyboard_suffices(visitor: Visitor, site: Site) -> None:
    page = visitor.page
    prompt = page.get_by_role("textbox", name="Message", exact=True)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    expect(prompt).to_have_value("first\nsecond")
    page.keyboard.press("Enter")
    expect_answered(page)
    assert visitor.body()["messages"][0]["content"] == "first\nsecond"
    expect(prompt).to_have_value("")
    page.keyboard.press("Tab")  # to Send
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Live")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Parameters")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Parameters")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Engine")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Live")).to_be_visible()
    outlines = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outlines == "solid", "focus is visible"


@in_chromium
def test_composing_does_not_send(visitor: Visitor) -> None:
    page = visitor.page
    prompt = page.get_by_role("textbox", name="Message", exact=True)
    prompt.focus()
    keys = page.context.new_cdp_session(page)
    keys.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    page.keyboard.press("Enter")  # chooses a candidate
    keys.send("Input.insertText", {"text": "你好"})
    prompt.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})  # Safari's, after the composition
    expect(answers(page)).to_have_count(0)
    assert visitor.chats() == []
    expect(prompt).to_have_value(re.compile("你好"))
    page.keyboard.press("Enter")
    expect_answered(page)
    assert visitor.body()["messages"][0]["content"] == "你好"
