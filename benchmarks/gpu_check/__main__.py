"""Runs a bundle on the GPU of this host: first whether engines answer rightly, then how fast they are. Writes a JSON.

    make gpu-check                                                            # makes the bundle first
    python -m benchmarks.gpu_check build/gpu-check --out gpu-check.json      # on a GPU host: numpy and cuda-bindings
    python -m benchmarks.gpu_check build/gpu-check --dry-run                 # without a GPU: all but the device

With torch there, its int8 and fp16 products and its fp16 and int8 decoding loops are measured beside ours, and with
transformers its own. Fails where an answer is wrong, whatever the times are.
"""

from __future__ import annotations

import argparse
import json
import platform
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check.driving import Sequences, greedy
from runtime.errors import EngineError
from runtime.executors.cuda import CudaExecutor
from runtime.executors.cuda_device import CudaDevice, open_device
from runtime.program import CUBIN, Program, Weight, read_program

LARGE = "bloom-7b1"
TOLERANCE = {"none": 5e-3, "int8": 5e-2}  # of the largest logit; roundings to integers flip
CONTEXT, STEPS = 128, 64
_BLOCK = 64 << 20


def check_small(folder: Path, arch: str) -> dict[str, Any]:
    """Logits and greedy tokens of an engine beside those expected."""
    expected = np.load(folder / "expected.npz")
    executor = CudaExecutor(folder / "rank0", [arch], kv_tokens=1024)
    try:
        logits, tokens = greedy(executor, expected["ids"].tolist(), len(expected["tokens"]))
    finally:
        executor.close()
    wanted = expected["logits"]
    error = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    same = int((np.array(tokens) == expected["tokens"]).cumprod().sum())
    preset = folder.name.rpartition("-")[2]
    right = error < TOLERANCE[preset] and (preset != "none" or same == len(tokens))
    return {"largest_error": error, "same_greedy_tokens": same, "of": len(tokens), "right": right}


def check_large(folder: Path, arch: str, device: CudaDevice) -> dict[str, Any]:
    """Times of a 7B model with weights that are made up here."""
    program = read_program(folder)
    weight_bytes = sum(call.bytes for call in program.calls)
    found: dict[str, Any] = {"weight_bytes_of_a_step": weight_bytes, "copy_bytes_per_second": device.copy_bandwidth()}
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
        rank = make_weights(folder, Path(work))
        loads = []
        for _ in range(2):  # the first one measures which kernels are the fastest
            started = time.perf_counter()
            executor = CudaExecutor(rank, [arch])
            loads.append(time.perf_counter() - started)
            if len(loads) == 1:
                executor.close()
        found |= {"first_load_s": loads[0], "load_s": loads[1]}
        found["choices"] = json.loads(next(rank.glob("choices-*.json")).read_text())["choices"]
        try:
            found |= _times(executor, weight_bytes, found["copy_bytes_per_second"])
        finally:
            executor.close()
    calls = program.kernel_calls
    return found | {"launches_before_fusion": calls.before_fusion, "launches": calls.after_fusion}


def _times(executor: CudaExecutor, weight_bytes: int, bandwidth: float) -> dict[str, Any]:
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for batch in (1, 2, 4, 8, 32, 128):
        sequences = Sequences(executor, batch, CONTEXT + 2 * STEPS)
        for sequence in range(batch):
            sequences.prefill(sequence, random.integers(5, 250, CONTEXT).tolist())
        sequences.decode(8)
        seconds = sequences.decode(STEPS)
        kv = batch * (CONTEXT + 8 + STEPS // 2) * executor.program.kv.block_bytes // executor.program.block_size
        share = (weight_bytes + kv) / bandwidth / seconds
        found[f"decode, batch {batch}"] = {"seconds": seconds, "tokens_per_second": batch / seconds, "share_of_copy": share}
    products = {}
    most = executor.program.max_tokens
    for call in [call for call in executor.program.calls if call.kind == "qlinear" and call.rows == "T"][:4]:
        seconds = executor.seconds_of(call, most)
        products[call.node] = {"seconds": seconds, "int8_ops": 2 * call.bytes * most / seconds}
    found[f"products of {most} tokens"] = products
    for length in (512, 2048):
        times = [_prompt(executor, random.integers(5, 250, length).tolist()) for _ in range(5)]
        found[f"prefill {length}"] = {"first_token_s": float(np.median(times[1:]))}
    return found


def _prompt(executor: CudaExecutor, tokens: list[int]) -> float:
    sequences, started = Sequences(executor, 1, len(tokens) + 1), time.perf_counter()
    sequences.prefill(0, tokens)
    return time.perf_counter() - started


def make_weights(folder: Path, work: Path) -> Path:
    """A rank's directory with weights of random bytes, and small numbers where they are floats."""
    for file in folder.iterdir():
        (work / file.name).symlink_to(file.resolve())
    header = (folder / "weights.header").read_bytes()
    tensors = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    block = np.random.default_rng(0).integers(-127, 128, _BLOCK, dtype=np.int8).tobytes()
    floats = np.full(_BLOCK // 4, 0.004, np.float32).tobytes()
    with open(work / "weights.safetensors", "wb") as weights:
        weights.write(header)
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = entry["data_offsets"]
            source = {"I8": block, "F32": floats}.get(entry["dtype"])
            if source is None:
                raise SystemExit(f"tensor {name} is {entry['dtype']}: not expected here")
            for at in range(start, stop, _BLOCK):
                weights.write(source[: min(_BLOCK, stop - at)])
    return work


def dry_run(bundle: Path, arch: str) -> list[str]:
    """What can be wrong with a bundle without a device: every program, kernel and tensor is looked at."""
    said = []
    for folder in sorted(path.parent for path in bundle.rglob("program.json")):
        program: Program = read_program(folder)
        with zipfile.ZipFile(folder / f"kernels-{arch}.zip") as file:
            missing = {name + CUBIN for name in program.kernel_names()} - set(file.namelist())
            broken = file.testzip()
        if missing or broken or program.candidates is None:
            raise SystemExit(f"{folder}: {broken or sorted(missing)[:1] or 'no candidates'} is missing or broken")
        weights = {arg.name for call in program.calls for arg in call.args if isinstance(arg, Weight)}
        said.append(f"{folder}: {len(program.calls)} calls, {len(program.launches)} kernels, {len(weights)} tensors")
    if not said:
        raise SystemExit(f"{bundle}: no program in it; make it with python -m benchmarks.gpu_check.bundle")
    return said


def run(bundle: Path, peers: bool) -> dict[str, Any]:
    """All checks, with what the host is."""
    arch = json.loads((bundle / "bundle.json").read_text())["arch"]
    device = open_device()
    about = {
        "gpu": device.name, "driver": device.driver_version, "python": platform.python_version(), "numpy": np.__version__,
        "date": date.today().isoformat(), "command": " ".join(sys.orig_argv[1:]),
    }  # fmt: skip
    found: dict[str, Any] = {"about": about}
    for folder in sorted(bundle.iterdir()):
        if (folder / "expected.npz").is_file():
            found[folder.name] = _said(folder.name, partial(check_small, folder, arch))
    found[LARGE] = _said(LARGE, lambda: check_large(bundle / LARGE, arch, device))
    device.close()
    if peers:
        from benchmarks.gpu_check.peers import measure

        found["peers"] = _said("peers", lambda: measure(json.loads((bundle / LARGE / "config.json").read_text())))
    return found


def _said(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    found = work()
    print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(found)[:600]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="leave torch and transformers alone")
    arguments = parser.parse_args()
    arch = json.loads((arguments.bundle / "bundle.json").read_text())["arch"]
    print("\n".join(dry_run(arguments.bundle, arch)))
    if arguments.dry_run:
        return
    try:
        found = run(arguments.bundle, not arguments.no_peers)
    except EngineError as error:
        raise SystemExit(f"{error} The bundle itself is whole.") from None
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [name for name, entry in found.items() if not entry.get("right", True)]
    if wrong:
        raise SystemExit(f"wrong answers: {', '.join(wrong)}; see {arguments.out}")


if __name__ == "__main__":
    main()
