"""Runs a bundle on the GPU of this host: first whether engines answer rightly, then how fast they are. Writes a JSON.

    make gpu-check                                                                 # makes the bundle first
    python -m benchmarks.gpu_check build/gpu-check-h100 --out gpu-check.json      # on a GPU host: numpy and cuda-bindings
    python -m benchmarks.gpu_check build/gpu-check-h100 --dry-run                 # without a GPU: all but the device

Each check is a process with a time limit, and what it finds is in the JSON from then on: one that hangs or crashes takes
nothing away. With onnxruntime-gpu there, engines of its backend are run; with torch, its int8 and fp16 products and its int8
and fp16 decoding loops are measured beside ours, and with transformers its own. Fails where a check fails or an answer is
wrong, whatever the times are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.onnxruntime_sizes import MODEL_NAME
from belle_compile.runtime.program import CUBIN, WEIGHTS_NAME, Program
from belle_compile.runtime.program_json import read_program
from benchmarks.gpu_check import adapters
from benchmarks.gpu_check.checks import DEVICE, EXPECTED, GREEDY, LARGE, PROMPT
from benchmarks.gpu_check.findings import read, write
from benchmarks.gpu_check.provider import FOLDER, PACKAGE

PEERS = "peers"
LIMITS = {DEVICE: 60, LARGE: 240, f"{FOLDER}/{LARGE}": 120, PEERS: 300}  # seconds
SMALL_LIMIT = 90
SECONDS = 570  # for all


def checks_of(bundle: Path, peers: bool) -> dict[str, int]:
    """What is run, in this order, and for how many seconds at most."""
    small = sorted(file.parent.name for file in bundle.glob(f"*/{EXPECTED}"))
    of_provider = sorted(f"{FOLDER}/{file.parent.name}" for file in bundle.glob(f"{FOLDER}/*/{EXPECTED}"))
    with_adapters = sorted(f"{adapters.FOLDER}/{file.parent.name}" for file in bundle.glob(f"{adapters.FOLDER}/*/{EXPECTED}"))
    names = [DEVICE, *small, *with_adapters, LARGE, *of_provider, f"{FOLDER}/{LARGE}", *([PEERS] if peers else [])]
    return {name: LIMITS.get(name, SMALL_LIMIT) for name in names}


def command_of(bundle: Path, name: str, findings: Path) -> list[str]:
    """The process of a check; with the handler of faults, which says where it hung."""
    python = [sys.executable, "-X", "faulthandler", "-m"]
    if name == PEERS:
        return [*python, "benchmarks.gpu_check.peers", str(bundle / LARGE / "config.json"), str(findings)]
    return [*python, "benchmarks.gpu_check.checks", str(bundle), name, str(findings)]


def dry_run(bundle: Path) -> list[str]:
    """What can be wrong with a bundle without a device: every program, kernel and tensor is looked at, and the answers."""
    try:
        arch = json.loads((bundle / "bundle.json").read_text())["arch"]
        if not (folders := sorted(path.parent for path in bundle.rglob("program.json"))):
            raise FileNotFoundError("no program in it")
        said = [_program(folder, arch, bundle) for folder in folders]
        said += [_model(folder, bundle) for folder in sorted(bundle.glob(f"{FOLDER}/*/rank0"))]
        return said + [_expected(file) for file in sorted(bundle.glob(f"*/{EXPECTED}"))]
    except (OSError, ValueError, KeyError, EngineError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{bundle}: {error}; make it with python -m benchmarks.gpu_check.bundle") from None


def _program(folder: Path, arch: str, bundle: Path) -> str:
    program: Program = read_program(folder)
    with zipfile.ZipFile(folder / f"kernels-{arch}.zip") as file:
        missing = {name + CUBIN for name in program.kernel_names()} - set(file.namelist())
        broken = file.testzip()
    if missing or broken or program.candidates is None:
        raise ValueError(f"{folder}: {broken or sorted(missing)[:1] or 'no candidates'} is missing or broken")
    if (folder / "weights.header").is_file():
        header = json.loads((folder / "weights.header").read_bytes()[8:])
    else:
        with open(folder / "weights.safetensors", "rb") as weights:
            header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
    if lacking := set(program.weight_names()) - set(header):
        raise ValueError(f"{folder}: tensor {min(lacking)} is missing")
    tensors, kernels = len(program.weight_names()), len(program.launches)
    return f"{folder.relative_to(bundle)}: {len(program.calls)} calls, {kernels} kernels for {arch}, {tensors} tensors"


def _model(folder: Path, bundle: Path) -> str:
    """A model of ONNX Runtime: each of its weights is there."""
    size, lacking = (
        (folder / MODEL_NAME).stat().st_size,
        {"weights.header", WEIGHTS_NAME} - {file.name for file in folder.iterdir()},
    )
    if not size or len(lacking) != 1:
        raise ValueError(f"{folder}: {MODEL_NAME} or its weights are missing")
    return f"{folder.relative_to(bundle)}: {size} bytes of {MODEL_NAME}"


def _expected(file: Path) -> str:
    with np.load(file) as expected:
        ids, tokens, logits = expected["ids"], expected["tokens"], expected["logits"]
    if (len(ids), len(tokens), len(logits)) != (PROMPT, GREEDY, PROMPT + GREEDY - 1) or not np.isfinite(logits).all():
        raise ValueError(f"{file}: {len(ids)} tokens, {len(tokens)} after them, logits {logits.shape} do not fit")
    different = len(np.unique(tokens))
    return f"{file.parent.name}: logits of {len(logits)} tokens, an answer of {GREEDY} with {different} different ones"


def run(bundle: Path, out: Path, checks: dict[str, int], seconds: float) -> dict[str, Any]:
    """All checks, one after the other; ends with the first where there is no GPU to be used."""
    packages = {name: _version(name) for name in ("numpy", "cuda-bindings", PACKAGE, "torch", "transformers")}
    found: dict[str, Any] = {
        "about": {"date": date.today().isoformat(), "python": platform.python_version(), "packages": packages}
        | json.loads((bundle / "bundle.json").read_text())
    }
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
        for number, (name, limit) in enumerate(checks.items()):
            _run_one(bundle, name, Path(work) / f"{number}.json", min(limit, end - time.monotonic()), found, out)
            if name == DEVICE and "failed" in found[name]:
                break
    return found


def _run_one(bundle: Path, name: str, findings: Path, limit: float, found: dict[str, Any], out: Path) -> None:
    """Run a check, and keep writing what is known; what is not run is said too."""
    started = time.monotonic()
    if limit < 5:
        found[name] = {"failed": "not run: no time was left"}
    else:
        process = subprocess.Popen(command_of(bundle, name, findings))
        failed = None
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            found[name] = read(findings)
            write(out, found)
            if process.poll() is None and time.monotonic() - started > limit:
                failed = f"ended after {limit:.0f} s"
                _end(process)
                break
        if process.returncode and not failed:
            failed = f"exit code {process.returncode}"
        entry = read(findings)
        found[name] = entry | ({"failed": entry.get("failed", failed)} if failed else {})
    found[name]["wall_s"] = round(time.monotonic() - started, 1)
    write(out, found)
    print(f"{name}: {json.dumps(found[name])[:1500]}", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have it say where it is, then end it; the driver may keep it for ever."""
    for sent in (signal.SIGABRT, signal.SIGKILL):
        process.send_signal(sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="leave torch and transformers alone")
    parser.add_argument("--only", action="append", metavar="CHECK", help="one check, by its name; may be given again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all checks (default: %(default)s)")
    arguments = parser.parse_args()
    print("\n".join(dry_run(arguments.bundle)))
    checks = checks_of(arguments.bundle, not arguments.no_peers)
    if unknown := set(arguments.only or ()) - set(checks):
        parser.error(f"no check {min(unknown)}: there are {', '.join(checks)}")
    checks = {name: limit for name, limit in checks.items() if name in (arguments.only or checks)}
    if arguments.dry_run:
        print(f"A GPU host runs, for {arguments.seconds:.0f} s at most, each into {arguments.out} as it goes:")
        for name, limit in checks.items():
            print(f"  at most {limit} s: {' '.join(command_of(arguments.bundle, name, Path('FINDINGS')))}")
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = run(arguments.bundle, arguments.out, checks, arguments.seconds)
    bad = {
        name: entry.get("failed", "wrong answers")
        for name, entry in found.items()
        if name != PEERS and ("failed" in entry or not entry.get("right", True))
    }
    if bad:
        raise SystemExit("\n".join([f"see {arguments.out}:", *(f"  {name}: {reason}" for name, reason in bad.items())]))


if __name__ == "__main__":
    main()
