"""Layout, charts, facts and API keys of the page at `/`, in headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.runtime.server.browsing import CONTRASTS, OVERFLOW, SMALL_TARGETS, Site, Visitor
from tests.runtime.server.page_visits import (
    DESKTOP,
    LEAST_TARGET,
    PHONE,
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
from tests.runtime.server.serving import listening

__all__ = ["browser", "model", "served", "service", "site", "visit", "visitor"]  # fixtures


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
    assert site.service.current.report
    locked = Service(site.engine, ServerOptions(api_keys=("sesame",)), directory=site.service.current.report.parent)
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
