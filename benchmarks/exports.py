"""Exports in the runtimes that they are for, beside each runtime's own quantizer: teacher-forced against float32.

    python -m benchmarks.exports --vllm PYTHON --compressor PYTHON --llama PYTHON --genai PYTHON [--model MODEL]
                                   [--only NAME ...]
    python -m benchmarks.exports --table      # the table of docs/accuracy.md, from the results

PYTHON are interpreters of environments of their own, in which vLLM's CPU build, llm-compressor and llama-cpp-python are
installed (see benchmarks/peers/README.md). Exports are made once, under build/exports, and measured on text that no calibration
saw. vLLM's own quantizer is llm-compressor, to W8A8: rounded to nearest, and with the recipe of its examples, calibrated with
the same requests as ours. llama.cpp's is its Q8_0, and that of ONNX Runtime GenAI the int8 of its model builder
(benchmarks/genai_own.py). Exports of a model with the dimensions of BLOOM-1b1 and random weights show
that such files load and answer, and nothing about accuracy. Results of earlier runs stay in exports.json unless they are
measured again. The machine may be busy: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.exports import driver
from belle_compile.compiler.exports.request import ExportRequest
from belle_compile.compiler.exports.runtimes import GENAI, LLAMA_CPP, VLLM, ForeignRuntime, RunningRuntime
from benchmarks import checkpoints, machine
from benchmarks.fetch_smollm2 import fetch
from benchmarks.genai_own import own_int8
from benchmarks.peers.convert import FILE_TYPES, QUANTIZE
from benchmarks.text import windows

RESULTS = Path(__file__).parent / "results" / "exports.json"
FOLDER = Path("build/exports")
TRAINED_BLOOM = Path("tests/fixtures/tiny-bloom-trained")
WINDOW, CALIBRATED, HELD_OUT = 160, 12, 20  # tokens of a held-out window, windows to calibrate with and held out
CALIBRATION_WINDOW = 256
SMOLLM2, RANDOM = "smollm2-135m", "bloom-1b1"
PROMPT = {SMOLLM2: "The capital of France is", TRAINED_BLOOM.name: "The class has", RANDOM: "The class has"}
RANDOM_HELD_OUT = 2  # windows of the model with random weights
CONTINUED = 12  # tokens of a greedy answer that is shown


@dataclass(frozen=True)
class Row:
    """An export (`options` of ExportRequest; None: by the runtime's own quantizer) of some `models`, and the runtime that runs
    it. `title` is what the table calls it."""

    name: str
    title: str
    runtime: ForeignRuntime
    format: str
    options: dict[str, Any] | None
    models: tuple[str, ...] = (SMOLLM2, TRAINED_BLOOM.name)


# A head that is tied to the embedding stays so, but in the rows with one of its own, which are larger therefore.
ROWS = (
    Row("vllm-own-nearest", "llm-compressor, rounded to nearest", VLLM, "compressed-tensors", None),
    Row("vllm-own", "llm-compressor, SmoothQuant and GPTQ", VLLM, "compressed-tensors", None),
    Row("vllm", "**ours, calibrated**", VLLM, "compressed-tensors", {"calibrated": True}),
    Row(
        "vllm-untied", "ours, calibrated, R1; head of its own", VLLM, "compressed-tensors",
        {"calibrated": True, "keep_tied": False}, (SMOLLM2,),  # vLLM's BLOOM loads no head of its own
    ),
    Row("llama.cpp-own", "llama.cpp's Q8_0", LLAMA_CPP, "gguf", None),
    Row("llama.cpp-nearest", "ours, without calibration", LLAMA_CPP, "gguf", {}),
    Row("llama.cpp", "**ours, calibrated**", LLAMA_CPP, "gguf", {"calibrated": True}),
    Row(
        "llama.cpp-channels", "ours, calibrated, scales of channels", LLAMA_CPP, "gguf",
        {"calibrated": True, "granularity": "channel"},
    ),
    Row("genai-own", "GenAI's int8, float32 embedding", GENAI, "onnx", None),
    Row("genai-nearest", "ours, without calibration; head of its own", GENAI, "onnx", {}),
    Row("genai", "**ours, calibrated**; head of its own", GENAI, "onnx", {"calibrated": True}),
    Row(
        "genai-accurate", "ours, calibrated, `int8-accurate`; head of its own", GENAI, "onnx",
        {"calibrated": True, "quantization": "int8-accurate"},
    ),
    Row("vllm-random", "ours, without calibration", VLLM, "compressed-tensors", {}, (RANDOM,)),
    Row("llama.cpp-random", "ours, without calibration", LLAMA_CPP, "gguf", {}, (RANDOM,)),
)  # fmt: skip


class Source:
    """A float32 checkpoint in Transformers' format, made of what the model is released as, and text in its tokens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = FOLDER / name / "float"
        if name == RANDOM:
            self.path = checkpoints.make(RANDOM, Path("build/checkpoints") / RANDOM)
        elif not self.path.exists():
            released = TRAINED_BLOOM if name == TRAINED_BLOOM.name else fetch(Path("build/smollm2"))
            driver.export(ExportRequest(released, self.path, "safetensors", quantization="none"))
        self.tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self.calibration, self.held_out = self._texts()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def requests(self) -> Path:
        """The file of requests to calibrate with."""
        file = FOLDER / self.name / "requests.jsonl"
        file.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in self.calibration), encoding="utf-8")
        return file

    def reference(self) -> list[npt.NDArray[np.float32]]:
        """The logits of Transformers in float32 on each held-out window."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        with torch.inference_mode():
            return [model(torch.tensor([ids])).logits[0].numpy() for ids in self.held_out]

    def _texts(self) -> tuple[list[list[int]], list[list[int]]]:
        calibration, held_out = windows(self.encode, CALIBRATED, RANDOM_HELD_OUT if self.name == RANDOM else HELD_OUT)
        if self.name == TRAINED_BLOOM.name:  # it was trained on that text, and has its own that it was not
            ids = [self.encode((TRAINED_BLOOM / f"heldout-{language}.txt").read_text("utf-8")) for language in ("en", "zh")]
            held_out = [part[i * WINDOW :] for part in ids for i in range(min(HELD_OUT // 2, len(part) // WINDOW))]
        return [ids[:CALIBRATION_WINDOW] for ids in calibration], [ids[:WINDOW] for ids in held_out]


def made(row: Row, source: Source, quantizers: dict[str, Path]) -> Path:
    """The export of a row, made where it is missing. `quantizers` are the interpreters of runtimes' own, by runtime."""
    out = FOLDER / source.name / row.name
    if out.exists():
        return out
    if row.options is None:
        return OWN[row.runtime.title](row, source, out, quantizers[row.runtime.title])
    options = {key: value for key, value in row.options.items() if key != "calibrated"}
    if "calibrated" in row.options:
        options |= {"calibration": source.requests(), "gate": None}
    driver.export(ExportRequest(source.path, out, row.format, **options))
    return out


def _own_w8a8(row: Row, source: Source, out: Path, python: Path) -> Path:
    """llm-compressor's W8A8 of the float32 model."""
    script = Path(__file__).parent / "peers" / "llm_compressor_w8a8.py"
    how = ["nearest"] if row.name.endswith("nearest") else ["gptq"]
    requests = [] if row.name.endswith("nearest") else [str(source.requests())]
    subprocess.run([str(python), str(script), *how, str(source.path), str(out), *requests], check=True, capture_output=True)
    return out


def _own_q8_0(row: Row, source: Source, out: Path, llama: Path) -> Path:
    """llama.cpp's Q8_0 of the float32 model."""
    script, full = Path(__file__).parent / "peers" / "gguf_from_hf.py", out.parent / "float32.gguf"
    subprocess.run([sys.executable, str(script), str(source.path), str(full)], check=True, capture_output=True)
    out.mkdir()
    command = [str(llama), "-c", QUANTIZE, str(full), str(out / "model.gguf"), str(FILE_TYPES["q8_0"]), "2"]
    subprocess.run(command, check=True, capture_output=True)
    full.unlink()
    return out


def _own_int8(row: Row, source: Source, out: Path, genai: Path) -> Path:
    """GenAI's int8 of the float32 model."""
    return own_int8(source.path, out, genai)


OWN: dict[str, Callable[[Row, Source, Path, Path], Path]] = {
    VLLM.title: _own_w8a8,
    LLAMA_CPP.title: _own_q8_0,
    GENAI.title: _own_int8,
}


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".data"))


def compared(source: Source, reference: Sequence[npt.NDArray[np.float32]], running: RunningRuntime) -> dict[str, Any]:
    """The means over all held-out windows, and a greedy answer as text."""
    comparison = Comparison()
    for ids, expected in zip(source.held_out, reference, strict=True):
        logits = torch.from_numpy(running.logits(ids).copy())
        comparison.add(torch.from_numpy(expected), logits, ids)
    prompt = source.encode(PROMPT[source.name])
    ids = list(prompt)
    for _ in range(CONTINUED):
        ids.append(int(running.logits(ids)[-1].argmax()))
    return comparison.means() | {"answer": source.tokenizer.decode(ids[len(prompt) :])}


def measure(
    row: Row, source: Source, reference: Callable[[], Sequence[Any]], pythons: dict[str, Path], quantizers: dict[str, Path]
) -> dict[str, Any]:
    """One result: the model, the runtime, how it was quantized, its size and its accuracy."""
    python = pythons[row.runtime.title]
    folder, expected = made(row, source, quantizers), reference()  # before the runtime takes memory
    with row.runtime.start(folder, WINDOW + CONTINUED, python) as running:
        means = compared(source, expected, running)
    record = folder / "export.json"
    quantization = json.loads(record.read_text())["quantization"] if record.exists() else {"by": row.title}
    return {
        "model": source.name,
        "row": row.name,
        "runtime": f"{row.runtime.title} {row.runtime.version(python)}",
        "quantization": quantization,
        "weight_bytes": weight_bytes(folder),
        **means,
    }


def stored() -> list[dict[str, Any]]:
    """The results of earlier runs."""
    return json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []


def store(result: dict[str, Any]) -> None:
    """Write a result beside those of other rows, in the order of models and rows."""
    results = {(found["model"], found["row"]): found for found in (*stored(), result)}
    models, rows = list(PROMPT), [row.name for row in ROWS]
    order = sorted((key for key in results if key[1] in rows), key=lambda key: (models.index(key[0]), rows.index(key[1])))
    text = f"up to {HELD_OUT} windows of {WINDOW} tokens that no calibration saw"
    report = {"text": text, "results": [results[key] for key in order], "machine": machine.describe()}
    RESULTS.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table, in the order of ROWS."""
    lines = [
        "| model | runtime | quantized by | MB | KL | top-1 agreement | perplexity ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in PROMPT:
        for row in ROWS:
            for found in (found for found in results if (found["model"], found["row"]) == (model, row.name)):
                figures = f"{found['kl']:.5f} | {found['top1_agreement']:.3f} | {found['perplexity_ratio']:.3f}"
                megabytes = f"{found['weight_bytes'] / 1e6:.1f}"
                lines.append(f"| {model} | {found['runtime']} | {row.title} | {megabytes} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--compressor", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--llama", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--genai", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--model", action="append", choices=list(PROMPT))
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    arguments = parser.parse_args()
    pythons = {VLLM.title: arguments.vllm, LLAMA_CPP.title: arguments.llama, GENAI.title: arguments.genai}
    quantizers = pythons | {VLLM.title: arguments.compressor}
    if arguments.table:
        print(table(stored()))
        return
    for name in arguments.model or list(PROMPT):
        source = Source(name)
        logits: list[Any] = []

        def reference(source: Source = source, logits: list[Any] = logits) -> Sequence[Any]:
            logits[:] = logits or source.reference()
            return logits

        for row in (row for row in ROWS if row.name in arguments.only and name in row.models):
            result = measure(row, source, reference, pythons, quantizers)
            print(json.dumps(result, ensure_ascii=False), flush=True)
            store(result)


if __name__ == "__main__":
    main()
