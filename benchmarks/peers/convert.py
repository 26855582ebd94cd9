"""A row's engine from a checkpoint: the peers' under PEERS_HOME/engines, ours under build/engines.

    python -m benchmarks.peers.convert llama-1b [ROW or PEER ...]

An engine that is there is kept; ours is made again after a change of its sources. Beside each peer's engine stands a note,
ENGINE.json, with the weight bytes that one decoding step reads; of ours the program says it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tokenizers

from belle_compile.runtime.program import PROGRAM_NAME
from benchmarks.engines import SHAPES, cost
from benchmarks.peers.home import ENGINES, LOGS, MODELS, PeersError, check_space, remove, run_logged, venv_python
from benchmarks.peers.models import tensor_shapes, untied_embedding, weights_read
from benchmarks.peers.rows import OURS, Row, choose, read_rows
from benchmarks.text import windows

QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}  # enum llama_ftype
ORT_BYTES = {"int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}  # per weight: blocks of 32 with a float32 scale
CALIBRATION_WINDOWS = 80
SOURCES = ("compiler", "passes", "runtime")


@dataclass(frozen=True)
class Ready:
    """A row that can be run."""

    row: Row
    python: Path
    engine: Path
    bytes_per_token: float  # weight bytes that a decoding step reads


def prepare(row: Row, model: Path) -> Ready:
    """Make the row's engine where it is missing; raises PeersError where that fails."""
    if row.is_ours:
        engine = _ours(model, row.format, row.backend)
        has_program = (engine / "rank0" / PROGRAM_NAME).is_file()
        read = cost(engine).weight_bytes if has_program else weights_read(model) * row.bits / 8
        return Ready(row, Path(sys.executable), engine, read)
    python = venv_python(row.peer)
    if not row.format:  # the checkpoint itself
        return Ready(row, python, model, weights_read(model) * row.bits / 8)
    engine = engine_path(row.peer, model.name, row.format)
    note = engine.with_name(engine.name + ".json")
    if not (engine.exists() and note.is_file()):
        _convert(row, model, engine, note)
    return Ready(row, python, engine, float(json.loads(note.read_text())["bytes_per_token"]))


def engine_path(peer: str, shape: str, form: str, backend: str = "") -> Path:
    """Where an engine lies."""
    if peer == OURS:
        return Path("build/engines") / "-".join(["peers", shape, *([] if form == "int8" else [form]), *filter(None, [backend])])
    return ENGINES / (f"{shape}-{form}.gguf" if peer == "llama" else f"{peer}-{shape}-{form}")


@cache
def sources_digest() -> str:
    """SHA-256 of what our engines are made of and run by: all files of the packages, but for caches."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in SOURCES:
        for path in sorted((root / package).rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
                digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _ours(model: Path, form: str, backend: str = "") -> Path:
    """An engine of a preset; "PRESET+calibrated": by text that nothing is judged with."""
    engine = engine_path(OURS, model.name, form, backend).absolute()
    stamp = engine.with_name(engine.name + ".sources")
    if (engine / "manifest.json").is_file() and stamp.is_file() and stamp.read_text().strip() == sources_digest():
        return engine
    engine.parent.mkdir(parents=True, exist_ok=True)
    check_space(engine.parent, 1.1 * weights_read(model), f"the engine {engine.name}")
    stamp.unlink(missing_ok=True)
    print(f"{engine.name}: compiling", flush=True)
    preset, _, calibrated = form.partition("+")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "belle_compile.compiler",
        "build",
        model,
        "--quant",
        preset,
        "--force",
        "-o",
        engine,
    ]
    command += ["--backend", backend] if backend else []
    if calibrated:
        requests = LOGS / f"requests-{model.name}.jsonl"
        write_requests(model, requests)
        command += ["--calibration", requests, "--no-gate"]
    run_logged(command, engine.name)
    stamp.write_text(sources_digest() + "\n")
    return engine


def write_requests(model: Path, out: Path) -> None:
    """Windows of text in the tokens of a checkpoint."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    given, _ = windows(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, CALIBRATION_WINDOWS, 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in given), encoding="utf-8")


def _convert(row: Row, model: Path, engine: Path, note: Path) -> None:
    """It appears under its name only when it is complete."""
    ENGINES.mkdir(parents=True, exist_ok=True)
    # What is read besides the output, and two bytes a weight for what converters write in between.
    check_space(ENGINES, weights_read(model) * (2 + 1.2 * row.bits / 8), f"the engine {engine.name}")
    partial = engine.with_name(f"partial-{engine.name}")
    for leftover in (partial, engine, note):
        remove(leftover)
    print(f"{engine.name}: converting", flush=True)
    start = time.perf_counter()
    try:
        read = CONVERTERS[row.peer](model, partial, row.format)
        size = sum(file.stat().st_size for file in ([partial] if partial.is_file() else partial.rglob("*")))
        partial.rename(engine)
    finally:
        remove(partial)
    seconds = round(time.perf_counter() - start, 1)
    note.write_text(json.dumps({"bytes_per_token": round(read), "bytes": size, "seconds": seconds}) + "\n")


def _to_llama(model: Path, out: Path, form: str) -> float:
    """Through a GGUF in the checkpoint's precision, which several formats share; `forget_sources` removes it."""
    source = _gguf_source(model.name)
    if not source.exists():
        partial = source.with_suffix(".partial")
        run_logged([venv_python("hf"), Path(__file__).with_name("gguf_from_hf.py"), model, partial], f"gguf-{model.name}")
        partial.rename(source)
    run_logged([venv_python("llama"), "-c", QUANTIZE, source, out, str(FILE_TYPES[form]), "0"], f"llama-{model.name}-{form}")
    script = Path(__file__).with_name("gguf_from_hf.py")
    return float(run_logged([venv_python("hf"), script, "--bytes", out], f"gguf-{model.name}").split()[-1])


def _to_ct2(model: Path, out: Path, form: str) -> float:
    converter = venv_python("hf").with_name("ct2-transformers-converter")
    command: list[str | Path] = [
        converter,
        "--model",
        model,
        "--output_dir",
        out,
        "--quantization",
        form,
        "--low_cpu_mem_usage",
    ]
    run_logged(command, f"ct2-{model.name}-{form}")
    return (out / "model.bin").stat().st_size - (4 if form == "float32" else 1) * untied_embedding(model)


def _to_ort(model: Path, out: Path, form: str) -> float:
    cache_folder = LOGS / "ort-cache"
    builder: list[str | Path] = [venv_python("hf"), "-m", "onnxruntime_genai.models.builder"]
    run_logged([*builder, "-i", model, "-o", out, "-p", form, "-e", "cpu", "-c", cache_folder], f"ort-{model.name}-{form}")
    remove(cache_folder)
    return weights_read(model) * ORT_BYTES[form]


def _to_ov(model: Path, out: Path, form: str) -> float:
    exporter = venv_python("ov-export").with_name("optimum-cli")
    task = ["--task", "text-generation-with-past", "--weight-format", form]
    run_logged([exporter, "export", "openvino", "--model", model, *task, out], f"ov-{model.name}-{form}")
    return (out / "openvino_model.bin").stat().st_size - untied_embedding(model)


def _to_vllm(model: Path, out: Path, form: str) -> float:
    """Our export to compressed-tensors, rounded to nearest."""
    export: list[str | Path] = [
        sys.executable,
        "-m",
        "belle_compile.compiler",
        "export",
        model,
        "--format",
        "compressed-tensors",
    ]
    run_logged([*export, "-o", out], f"vllm-{model.name}-{form}")
    return float(weights_read(model))


CONVERTERS: dict[str, Callable[[Path, Path, str], float]] = {
    "llama": _to_llama,
    "ct2": _to_ct2,
    "ort": _to_ort,
    "ov": _to_ov,
    "vllm": _to_vllm,
}


def _gguf_source(shape: str) -> Path:
    return ENGINES / f"{shape}-source.gguf"


def forget_sources(shape: str) -> None:
    """Remove what conversions left in between."""
    remove(_gguf_source(shape))
    remove(_gguf_source(shape).with_suffix(".partial"))


def prepare_all(rows: list[Row], model: Path, failed_peers: dict[str, str]) -> tuple[list[Ready], list[tuple[Row, str]]]:
    """The rows that can be run, and those that cannot, each with its error."""
    ready: list[Ready] = []
    failed: list[tuple[Row, str]] = []
    try:
        for row in rows:
            try:
                ready.append(prepare(row, model))
            except PeersError as error:
                because = failed_peers.get(row.peer)
                failed.append((row, because or str(error)))
                print(f"{row.name}: {failed[-1][1]}", file=sys.stderr, flush=True)
    finally:
        forget_sources(model.name)
    return ready, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("only", nargs="*")
    arguments = parser.parse_args()
    model = MODELS / arguments.shape
    try:
        if not tensor_shapes(model):
            raise PeersError(f"no checkpoint in {model}: run python -m benchmarks.peers.models {arguments.shape}")
        rows = choose(read_rows(), arguments.shape, arguments.only)
    except PeersError as error:
        raise SystemExit(f"peers: {error}.") from None
    ready, failed = prepare_all(rows, model, {})
    for one in ready:
        print(f"{one.row.name}: {one.engine}, {one.bytes_per_token / 1e6:.1f} MB read per token")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
