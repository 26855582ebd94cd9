"""Reports with something in every section, and with nothing; and reading pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html.parser import HTMLParser

from belle_compile.compiler.backends.base import KVCache, MemoryNeed
from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
from belle_compile.compiler.report import Arena, Drift, Effects, Memory, Report, Stage
from belle_compile.runtime.artifact import FileRecord, PassRecord
from tests.compiler.engines import MANIFEST

ODD = "a<b>&\"c'"  # a name that must be escaped


@dataclass(frozen=True)
class Damage:
    name: str
    weights: int
    output_error: float
    kl: float | None = None


ACCURACY = {
    "requests": 20, "tokens": 4000, "top1_agreement": 0.9612, "kl": 0.00412, "perplexity": 12.12, "perplexity_ratio": 1.01,
    "greedy_prefix": 0.83, "answers": 5, "answer_accuracy": 0.49, "accuracy_kept": 0.98, "something_new": 3,
    "limits": {"max_perplexity_ratio": 1.02, "min_top1": 0.97, "min_accuracy_kept": 0.98, "new_limit": 7},
}  # fmt: skip
COVERAGE = {
    "set": "0123abcd",
    "requests": {"kept": 900, "held out": 100},
    "length_histogram": [["1 to 16", 200], ["17 to 32", 700]],
    "label_shares": {"chat": 0.75, ODD: 0.25},
    "token_coverage": 0.31,
    "dropped": [{"reason": "a duplicate", "requests": 12}, {"reason": ODD, "requests": 1}],
    "length": {
        "unit": "tokens",
        "read": {"least": 1, "mean": 30.25, "greatest": 90},
        "histogram": [
            {"from": 1, "to": 1, "read": 60, "kept": 60, "calibration": 10, "holdout": 2},
            {"from": 2, "to": 3, "read": 40, "kept": 40, "calibration": 5, "holdout": 1},
        ],
    },
    "labels": {"route": [{"value": ODD, "read": 100, "calibration": 15, "read_share": 1.0, "calibration_share": 0.5}]},
    "nested": {"inner": {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "words": ["x", "y"], "none": None, "yes": True},
    "empty": {},
    "empty_list": [],
}
EFFECTS = Effects(
    (
        Stage("frontend", None, 4000, 70, True, Drift(0, 1, 0)),
        Stage("remove-unused", 0, 4000, 70, True, Drift(0, 1, 0)),
        Stage(ODD, 8, 4000, 70, True, Drift(1e-13, 1, 2e-6)),
        Stage("quantize-linears", 8, 1000, 90, False, Drift(0.0125, 0.96875, 0.05)),
        Stage("fuse-add-norm", 4, 1000, 30, True, Drift(0.0125, 0.96875, 0.05)),
    ),
    32,
    "",
)
BUFFERS = (PlannedBuffer("embed", 0, 2048, 0, 2), PlannedBuffer(ODD, 2048, 2048, 1, 49), PlannedBuffer("x", 0, 64, 3, 50))
MEMORY = Memory(
    need=MemoryNeed(weights=1664, kv_cache=128 * 1600, activations=4096, reserve=(1 << 20) - 1664 - 128 * 1600 - 4096),
    kv=KVCache("float16", 1600, 16, 4096),
    kv_tokens=2048,
    weights={"embedding": 600, "attention": 1000, "norms and tables": 64},
    arena=Arena(4096, BUFFERS, 50),
)


def full_report(kl: bool = False) -> Report:
    """Something in every section."""
    odd = PassRecord(ODD, {"keep": [ODD], "bits": 8}, 8, (f"{ODD}: stays",))
    model = replace(MANIFEST.model, name=ODD)
    manifest = replace(MANIFEST, model=model, passes=(*MANIFEST.passes, odd), accuracy=ACCURACY)
    layers = [Damage(f"layers.{i}.{part}", 100, 1e-4 * (i + 1), 1e-5 * (i + 1) if kl else None)
              for i in range(24) for part in ("q", ODD)]  # fmt: skip
    return Report(manifest, {"tokenizer.json": FileRecord("0" * 64, 1234)}, EFFECTS, MEMORY, layers, COVERAGE)


def empty_report() -> Report:
    """What a build without requests and drift has, and less."""
    return Report(replace(MANIFEST, passes=()))


class Page(HTMLParser):
    """A page's elements and text; tags must be closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.handle_data(" ")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data: str) -> None:
        self.sections[self.section] = self.sections.get(self.section, "") + data

    def text(self, section: str) -> str:
        """A section's text with single spaces."""
        return " ".join(self.sections[section].split())
