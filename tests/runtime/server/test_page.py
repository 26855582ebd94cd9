"""The page at `/` in headless Chromium, with a real server and an engine whose model is a script."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from belle_compile.runtime.artifact import REPORT_NAME, GenerationDefaults
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.metrics import Metrics
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.page import load_assets
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import FakeExecutor, byte_tokenizer, manifest
from tests.runtime.server.browsing import CONTRASTS, OVERFLOW, SMALL_TARGETS, ScriptedModel, Site, Visitor
from tests.runtime.server.serving import WAIT_S, listening, wait_until

CHROMIUM = shutil.which("chromium")
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
LEAST_TARGET = 44  # pixels, WCAG 2.5.5
DEFAULTS = GenerationDefaults(max_new_tokens=900, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2)
DIGEST = "ab" * 32
QUANTIZATION = {"scheme": "w8a8", "weights": "int8 per output channel", "kv_cache": "bfloat16"}
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture(scope="module")
def service(model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service of an engine that has a report and a result cache."""
    directory = tmp_path_factory.mktemp("engine")
    (directory / REPORT_NAME).write_text("<h1>Report</h1>", encoding="utf-8")
    facts, metrics = manifest(generation=DEFAULTS, digest=DIGEST, quantization=QUANTIZATION), Metrics()
    tokenizer, executor = Tokenizer(byte_tokenizer(), facts.special_tokens), FakeExecutor(model, max_blocks=64, num_blocks=256)
    with Engine(facts, tokenizer, executor, ResultCacheOptions(), telemetry=metrics) as engine:
        service = Service(engine, ServerOptions(), metrics, directory)
        yield service
        service.close()


@pytest.fixture(scope="module")
def served(model: ScriptedModel, service: Service) -> Iterator[Site]:
    with listening(service) as url:
        yield Site(url, service, model)


@pytest.fixture
def site(served: Site) -> Iterator[Site]:
    served.model.reset()
    yield served
    served.model.released.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Callable[..., Visitor]]:
    """visit(**options of the browser's context) makes a visitor. At the end, none may have had errors or left the origin."""
    visitors: list[Visitor] = []

    def make(viewport: ViewportSize = DESKTOP, **options: Any) -> Visitor:
        page = browser.new_context(viewport=viewport, **options).new_page()
        page.set_default_timeout(1000 * WAIT_S)
        visitors.append(Visitor(page))
        return visitors[-1]

    yield make
    site.model.released.set()
    for visitor in visitors:
        visitor.page.context.close()
        assert visitor.errors == []
        assert [request.url for request in visitor.requests if not re.match(r"http://127\.0\.0\.1:\d+/", request.url)] == []


@pytest.fixture
def visitor(visit: Callable[..., Visitor], site: Site) -> Visitor:
    """A visitor at a desktop who has opened the page."""
    visitor = visit()
    visitor.open(site.url)
    return visitor


def ask(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Any:
    return page.locator(".answer")


def expect_answered(page: Page, count: int = 1) -> None:
    """Wait until so many answers are there, the last one whole."""
    expect(page.locator(".answer footer:visible")).to_have_count(count)


def show_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


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


@in_chromium
def test_a_phone(visit: Callable[..., Visitor], site: Site) -> None:
    page = visit(PHONE, has_touch=True, is_mobile=True).open(site.url)
    site.model.answer = "W" * 300 + "\n```\n" + "long line " * 20 + "\n```"
    ask(page, "M" * 200)
    expect_answered(page)
    assert page.evaluate(OVERFLOW) <= 0 and page.evaluate(SMALL_TARGETS, LEAST_TARGET) == []
    expect(page.get_by_role("tab", name="Live")).to_be_hidden()
    opener = page.get_by_role("button", name="Live charts and parameters")
    opener.tap()
    sheet = page.get_by_role("dialog", name="Live charts, parameters and engine")
    for name in ("Live", "Parameters", "Engine"):
        sheet.get_by_role("tab", name=name).tap()
        expect(sheet.get_by_role("tabpanel", name=name)).to_be_visible()
        assert page.evaluate(OVERFLOW) <= 0 and page.evaluate(SMALL_TARGETS, LEAST_TARGET) == []
        box = sheet.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        assert sheet.get_by_role("tabpanel", name=name).evaluate("part => part.scrollWidth <= part.clientWidth")
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(opener).to_be_focused()
    opener.tap()
    sheet.get_by_role("button", name="Close").tap()
    expect(sheet).to_be_hidden()
    page.set_viewport_size(DESKTOP)
    expect(page.get_by_role("complementary").get_by_role("tab", name="Engine")).to_be_visible()
    expect(opener).to_be_hidden()


NAMED = set("button textbox spinbutton checkbox tab tabpanel link image dialog log main complementary".split())


@in_chromium
def test_controls_have_names(visitor: Visitor) -> None:
    page = visitor.page
    ask(page, "Hi")
    expect_answered(page)
    session = page.context.new_cdp_session(page)
    seen: set[str] = set()
    for tab in ("Live", "Parameters", "Engine"):
        show_tab(page, tab)
        nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
        roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
        assert [role for role, name in roles if role in NAMED and not name.strip()] == []
        seen |= {role for role, _ in roles}
    assert NAMED - {"dialog"} <= seen, "all kinds were looked at"
    assert page.locator("html").get_attribute("lang") == "en"


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit: Callable[..., Visitor], site: Site, scheme: str) -> None:
    visitor = visit(color_scheme=scheme, reduced_motion="reduce")
    page = visitor.open(site.url)
    show_tab(page, "Parameters")
    page.get_by_label("Top p").fill("7")
    ask(page, "Hi")
    expect(page.locator(".answer .error")).to_be_visible()
    visitor.errors.clear()
    page.get_by_label("Top p").fill("")
    ask(page, "Hi")
    expect_answered(page)
    for tab in ("Live", "Parameters", "Engine"):
        show_tab(page, tab)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 20
        assert [entry for entry in contrasts if entry[0] < 4.5] == []


@in_chromium
def test_charts_show_what_the_server_does(visitor: Visitor, site: Site) -> None:
    page = visitor.page
    site.model.answer, site.model.hold_at = "hello " * 30, 10
    ask(page, "Hi")
    expect(page.locator("#status")).to_have_text("1 running")
    requests = page.get_by_role("img", name=re.compile("^Requests, last 2 minutes. running: now 1, highest 1. waiting: now 0"))
    expect(requests).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^KV cache, .* in use: now [1-9]"))).to_be_visible()
    site.model.released.set()
    expect_answered(page)
    expect(
        page.get_by_role("img", name=re.compile("^Throughput, tokens.s, .* generated: now .*, highest [1-9]"))
    ).to_be_visible()
    for name in ("First token", "Time per token"):
        expect(page.get_by_role("img", name=re.compile(rf"^{name}, .* median: now [\d.]+ (ms|s|µs), highest"))).to_be_visible()
    expect(page.locator("#status")).to_have_text("Ready")
    expect(page.locator("#totals")).to_contain_text("tokens generated")
    path = page.locator(".chart").first.locator("path.line")
    assert re.fullmatch(r"M[\d.]+,[\d.]+([Lh][\d.,]+)+", path.first.get_attribute("d") or "")


@in_chromium
def test_a_page_that_nobody_sees_asks_for_nothing(visit: Callable[..., Visitor], site: Site) -> None:
    visitor = visit()
    visitor.page.clock.install()
    page = visitor.open(site.url)

    def asked() -> int:
        return sum(request.url.endswith("/stats") for request in visitor.requests)

    def become(state: str) -> None:
        page.evaluate("state => Object.defineProperty(document, 'visibilityState', {value: state, configurable: true})", state)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    expect(page.locator("#status")).to_have_text("Ready")
    become("hidden")
    before = asked()
    page.clock.run_for(10_000)
    assert asked() == before
    with page.expect_request("**/stats"):
        become("visible")


@in_chromium
def test_a_server_that_is_gone_and_comes_back(visit: Callable[..., Visitor], site: Site) -> None:
    visitor = visit()
    visitor.page.clock.install()
    page = visitor.open(site.url)
    expect(page.locator("#status")).to_have_text("Ready")
    page.route("**/stats", lambda route: route.abort())
    page.clock.run_for(1000)
    expect(page.locator("#status")).to_have_text("The server can't be reached.")
    expect(page.get_by_role("status")).to_have_text("The server can't be reached.")
    page.unroute("**/stats")
    page.clock.run_for(5000)
    expect(page.locator("#status")).to_have_text("Ready")
    visitor.errors.clear()


@in_chromium
@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "The connection ended before the answer did."),
        ('data: {"error": {"message": "The engine failed.", "type": "server_error"}}\n\n', "The engine failed."),
    ],
)
def test_a_stream_that_breaks_off(visitor: Visitor, end: str, message: str) -> None:
    page = visitor.page
    begun = 'data: {"choices": [{"index": 0, "delta": {"content": "So far"}}]}\r\n\r\n: alive\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=begun + end))
    ask(page, "Hi")
    expect(page.locator(".answer .error")).to_have_text(message)
    expect(page.locator(".answer .text")).to_have_text("So far")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text")).to_have_text("Hello there.")


@in_chromium
def test_facts_of_the_engine(visit: Callable[..., Visitor], site: Site) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).open(site.url)
    show_tab(page, "Engine")
    facts = page.get_by_role("tabpanel", name="Engine")
    for text in ("tiny", "cpu", "kernels-avx2", "w8a8", "KV cache", "0.00123 million", "bfloat16", "300 tokens"):
        expect(facts).to_contain_text(text)
    digest = facts.locator("dt", has_text="Digest").locator("+ dd").inner_text()
    facts.get_by_role("button", name="Copy digest").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == digest and re.fullmatch("[0-9a-f]{64}", digest)
    with page.context.expect_page() as opened:
        facts.get_by_role("link", name="Build report").click()
    expect(opened.value.get_by_role("heading", level=1)).to_have_text("Report")


@in_chromium
def test_an_api_key_is_asked_for(visit: Callable[..., Visitor], site: Site) -> None:
    visitor = visit()
    page = visitor.page
    assert site.service.report
    locked = Service(site.engine, ServerOptions(api_keys=("sesame",)), directory=site.service.report.parent)
    with listening(locked) as url:
        page.goto(url)
        dialog = page.get_by_role("dialog", name="This server needs an API key")
        expect(dialog.get_by_label("API key")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("API key needed")
        ask(page, "Hi")
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_label("API key")).to_have_value("")
        dialog.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        expect_answered(page)
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
        expect(page.locator("#status")).to_have_text("Ready")
        assert [request.headers.get("authorization") for request in visitor.chats()] == [None, "Bearer wrong", "Bearer sesame"]
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
        expect(dialog).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0, "a key is kept until its tab is closed"
        with page.expect_download() as saved:  # a link would carry no key
            show_tab(page, "Engine")
            page.get_by_role("link", name="Build report").click()
        assert saved.value.path().read_text() == "<h1>Report</h1>"
        page.goto("about:blank")
    locked.close()
    assert [error for error in visitor.errors if "401" not in error] == []
    visitor.errors.clear()
