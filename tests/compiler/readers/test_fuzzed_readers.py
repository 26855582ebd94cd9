"""Readers of damaged and hostile files end in success or in a CompileError, without a crash, a hang, or 200 MiB of memory.

FUZZ_EXAMPLES=5000 runs more examples, other ones each time.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.compiler.mutations import places
from tests.compiler.readers.runs import Runs
from tests.compiler.readers.samples import Sample, make_samples

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NAMES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "normalization", "pieces", "set.json",
    "index", "safetensors header", "model.safetensors", "archive", "pickle", "legacy pickle", "params.json", "encrypted",
    "gguf F32", "gguf Q8_0", "gguf llama", "gptq config.json", "gptq header", "packed header", "requests.jsonl",
    "requests.jsonl.gz", "requests.jsonl.zst",
)  # fmt: skip
# Texts that stand for values of JSON. Some are no JSON.
VALUES = [
    *"null true false 0 1 -1 2 3 63 2147483647 2147483648 4294967296 9223372036854775807 18446744073709551616".split(),
    *'1e400 -1e400 1.5 NaN Infinity "" "x" "\\ud800" "\\u0000" "</s>" "a\\nb"'.split(),
    *'[] {} [[]] [null] [1,2] [{}] [0,0] {"a":1} {"content":null}'.split(),
    "1" + "0" * 400,
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    f'"{"a" * 100_000}"',
    f"[{'0,' * 20_000}0]",
]
NUMBERS = (0, 1, 2, 3, 7, 255, 1 << 15, 1 << 16, 1 << 20, 1 << 29, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 33, 1 << 40,
           1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    return make_samples(tmp_path_factory.mktemp("samples"))


def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few bytes flipped, numbers replaced, parts removed or repeated, or without its end."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "byte", "number", "number", "near", "cut", "remove", "repeat", "insert"]))
        length = draw(st.integers(1, 64))
        if how == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and changed:
            changed[at] = draw(st.integers(0, 255))
        elif how in ("number", "near"):
            width = draw(st.sampled_from([1, 2, 4, 8]))
            old = int.from_bytes(changed[at : at + width], "little")
            new = draw(st.sampled_from(NUMBERS)) if how == "number" else old + draw(st.integers(-2, 2))
            changed[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
        elif how == "cut":
            del changed[at:]
        elif how == "remove":
            del changed[at : at + length]
        elif how == "repeat":
            changed[at:at] = changed[at : at + length] * draw(st.sampled_from([1, 2, 1000]))
        else:
            changed[at:at] = draw(st.binary(max_size=8))
    return bytes(changed)


def replaced(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON with a few values replaced by other ones, removed, or exchanged with a neighbour."""
    changed = json.loads(content)
    marks: dict[str, str] = {}
    for number in range(draw(st.integers(1, 3))):
        every = list(places(changed))
        if not every:
            break
        *way, last = every[draw(st.integers(0, len(every) - 1))]
        holder: Any = changed
        for key in way:
            holder = holder[key]
        how = draw(st.sampled_from(["set", "set", "set", "remove", "exchange"]))
        if how == "remove":
            del holder[last]
        elif how == "exchange":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[last], holder[other] = holder[other], holder[last]
        else:
            mark = f"mark {number}"
            marks[json.dumps(mark)] = draw(st.sampled_from(VALUES))
            holder[last] = mark
    text = json.dumps(changed, ensure_ascii=False)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_ends_in_success_or_a_sentence(name: str, samples: dict[str, Sample], runs: Runs) -> None:
    sample = samples[name]
    sample.file.write_bytes(sample.packed(sample.content))
    assert runs.end_of(sample.reader, sample.path) == ("read", "")
    ends, faults = [], []

    @SETTINGS
    @given(st.data())
    def check(data: st.DataObject) -> None:
        by_value = sample.is_json and data.draw(st.booleans())
        content = data.draw(st.composite(replaced if by_value else mutated)(sample.content))
        sample.file.write_bytes(sample.packed(content))
        end, detail = runs.end_of(sample.reader, sample.path)
        ends.append(end)
        if end not in ("read", "refused"):
            kept = sample.file.with_name(f"{sample.file.name}.fault{len(faults)}")
            kept.write_bytes(sample.packed(content))
            faults.append(f"{kept} {end}: {detail}")

    check()
    assert not faults, f"{len(faults)} of {len(ends)} runs:\n" + "\n".join(faults[:20])
    assert "refused" in ends  # so the mutations reach the reader
