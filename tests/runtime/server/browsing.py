"""A server with a page, for tests in a browser: its model is a script, and visitors note what goes wrong in their windows."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import ConsoleMessage, Page, Request, expect

from belle_compile.runtime.engine import Engine
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import EOS, VOCABULARY, byte_tokenizer
from tests.runtime.server.serving import WAIT_S

expect.set_options(timeout=1000 * WAIT_S)

# Expressions that a page evaluates.
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
SMALL_TARGETS = """least => [...document.querySelectorAll("button, a[href], input, textarea, label.check")]
    .filter(element => element.checkVisibility() && !element.matches(".skip, .check input"))
    .filter(element => { const box = element.getBoundingClientRect(); return box.width < least || box.height < least; })
    .map(element => element.outerHTML)"""
CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const fill = element => getComputedStyle(element).backgroundColor;
  const ground = element => (channels(fill(element))[3] ?? 1) === 0 ? ground(element.parentElement) : fill(element);
  const words = [...document.querySelectorAll("body *")].filter(element => element.checkVisibility()
    && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  return words.map(element => {
    const style = getComputedStyle(element);
    const colours = [element instanceof SVGElement ? style.fill : style.color, ground(element)];
    const [light, dark] = colours.map(luminance).sort((a, b) => b - a).map(value => value + 0.05);
    return [light / dark, element.textContent];
  });
}"""


class ScriptedModel:
    """A rule of `FakeExecutor`: answers every prompt with `answer`.

    It waits before token `hold_at` until it is released, and takes `pause_s` for each token.
    """

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.mark = self.tokenizer.encode("assistant:").ids
        self.reset()

    def reset(self) -> None:
        self.answer, self.hold_at, self.pause_s = "Hello there.", -1, 0.0
        self.released = threading.Event()

    def __call__(self, context: list[int]) -> NDArray[np.float32]:
        script = self.tokenizer.encode(self.answer).ids
        generated = self._generated(context)
        if generated == self.hold_at:
            assert self.released.wait(WAIT_S)
        time.sleep(self.pause_s)
        logits = np.zeros(VOCABULARY, np.float32)
        logits[script[generated] if generated < len(script) else EOS] = 50
        return logits

    def _generated(self, context: list[int]) -> int:
        """The number of tokens behind the last mark, which ends the prompt."""
        size = len(self.mark)
        return next(ago for ago in range(len(context)) if context[len(context) - ago - size : len(context) - ago] == self.mark)


@dataclass
class Site:
    """A server, and what its engine's model answers."""

    url: str
    service: Service
    model: ScriptedModel

    @property
    def engine(self) -> Engine:
        return self.service.engine


@dataclass
class Visitor:
    """A browser's window on the page, with what the page sent and what went wrong in it."""

    page: Page
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._logged)

    def _logged(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, url: str) -> Page:
        """Open the page and wait until it has the engine's facts."""
        self.page.goto(url)
        expect(self.page.get_by_role("heading", level=1)).to_have_text("tiny")
        return self.page

    def chats(self) -> list[Request]:
        """The requests for answers."""
        return [request for request in self.requests if request.url.endswith("/v1/chat/completions")]

    def body(self) -> dict[str, Any]:
        """The body of the last request for an answer."""
        body: dict[str, Any] = self.chats()[-1].post_data_json
        return body
