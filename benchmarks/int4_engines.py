"""INT4 engines at the bytes of llama.cpp's 4-bit files, and what both keep of SmolLM2-135M's accuracy.

    python -m benchmarks.int4_engines                     # every row
    python -m benchmarks.int4_engines --row q4_k_m:self   # one row, added to the results that are there

Each engine is built within the bytes of the weights of a file of llama.cpp, calibrated by requests (other windows of the text
that judges) or by requests that the model writes, and run by the runtime. The model is the one of `benchmarks.int4_schemes`
whose channels are shuffled, because the checkpoint is a 4-bit file expanded to float32; llama.cpp's files, made of it too, are
dequantized and computed with float32 activations, which is in their favour. Needs the peers' checkpoint of SmolLM2 and
environments "llama" and "hf". Writes results/int4-engines.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import Manifest, read_manifest
from benchmarks import machine
from benchmarks.engines import SMOLLM2
from benchmarks.int4_schemes import CALIBRATION, Judged, judged_texts, logits, peers, shuffled
from benchmarks.peers.home import MODELS, PeersError
from benchmarks.simulation import load_fp32
from benchmarks.text import windows

RESULT = Path("benchmarks/results/int4-engines.json")
FILES, CALIBRATED_BY = ("q4_0", "q4_k_m"), ("requests", "self")
ROWS = tuple(f"{file}:{by}" for file in FILES for by in CALIBRATED_BY)
CHECKPOINT = Path("build/checkpoints") / f"{SMOLLM2}-shuffled"


def prepare(source: Path, model: Any) -> None:
    """The checkpoint of the shuffled model, with the tokenizer and the configuration of the `source`."""
    shuffled(model).save_pretrained(CHECKPOINT)
    for file in source.glob("*"):
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, CHECKPOINT / file.name)


def engine_at(row: str, budget: float, requests: Path, folder: Path) -> Path:
    """The row's engine within the bytes of the weights of llama.cpp's file."""
    calibration = SelfWritten() if row.endswith(":self") else requests
    out = folder / row.replace(":", "-")
    return build(
        BuildRequest(
            CHECKPOINT, out, quantization="int4", calibration=calibration, weight_budget=int(budget), gate=None, force=True
        )
    )


def judge_engine(engine: Path, texts: Sequence[Judged], exact: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The bytes of its weights, its linears by bits, and KL, agreement and perplexity for each kind of text."""
    found: dict[str, Comparison] = {}
    with Engine.load(engine) as loaded:
        for text, reference in zip(texts, exact, strict=True):
            given = torch.from_numpy(np.array(loaded.logits(text.ids)))[text.start :]
            found.setdefault(text.kind, Comparison()).add(reference, given, text.ids[text.start :])
    bytes_read = (engine / "rank0" / "weights.safetensors").stat().st_size
    return {"bytes": bytes_read, **linears_by_bits(read_manifest(engine))} | {
        kind: comparison.means() for kind, comparison in found.items()
    }


def linears_by_bits(manifest: Manifest) -> dict[str, int]:
    """How many linears, beside the head, have 6 and 8 bits."""
    options = [record.options for record in manifest.passes if record.name == "use-more-bits"]
    return {bits: sum(len(each[bits]) for each in options) for bits in ("int6", "int8")}


def measure(
    rows: Sequence[str], budgets: Mapping[str, float], given: list[list[int]], judge: Callable[[Path], dict[str, Any]],
    on_row: Callable[[str, dict[str, Any]], None],
) -> None:  # fmt: skip
    """Build and judge the engine of each row, calibrated by the windows `given` or by its own requests."""
    with tempfile.TemporaryDirectory(dir="build") as name:
        folder = Path(name)
        requests = folder / "requests.jsonl"
        requests.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in given))
        for row in rows:
            on_row(row, judge(engine_at(row, budgets[row.partition(":")[0]], requests, folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one; repeatable")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    path = MODELS / SMOLLM2
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    model = load_fp32(path)
    texts = judged_texts(model, path, encode)
    exact = [logits(model, text) for text in texts]
    prepare(path, model)
    try:
        files, budgets = peers(CHECKPOINT, texts, exact)
    except PeersError as error:
        raise SystemExit(f"int4_engines: {error}.") from None
    engines = json.loads(arguments.out.read_text())["engines"] if arguments.row and arguments.out.is_file() else {}
    report = {"model": SMOLLM2, "calibration": CALIBRATION, "machine": machine.describe(), "files": files, "engines": engines}

    def keep(row: str, result: dict[str, Any]) -> None:
        engines[row] = result
        print(row, result, flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    measure(
        arguments.row or ROWS,
        budgets,
        windows(encode, CALIBRATION, 0)[0],
        lambda engine: judge_engine(engine, texts, exact),
        keep,
    )
    print(arguments.out)


if __name__ == "__main__":
    main()
