"""What tests of the page share: a server with a scripted model, and visitors in headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from belle_compile.runtime.artifact import REPORT_NAME, GenerationDefaults
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.server.metrics import Metrics
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import FakeExecutor, byte_tokenizer, manifest
from tests.runtime.server.browsing import ScriptedModel, Site, Visitor
from tests.runtime.server.serving import WAIT_S, listening

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
