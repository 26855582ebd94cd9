"""Builds a release of BELLE-7B's shape: one pickle of 28.3 GB in float32. Reports how long that takes, and how much memory.

The pickle is written by PyTorch, without values, which are then filled in: no more than a few megabytes of it are in memory.
It needs 37 GB of disk, which are free again at the end. In a control group smaller than the engine, the self-test takes long,
as the golden answers are then computed in float64:

    python -m benchmarks.build_belle_7b build/belle-7b
    python -m benchmarks.build_belle_7b build/belle-7b --control-group /sys/fs/cgroup/memory/belle   # with a limit of its own
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
from belle_compile.compiler.checkpoint.tensors import StoredValues
from benchmarks.checkpoints import COMMON, SHAPES, STD, write_tokenizer
from benchmarks.machine import describe

SHAPE = "bloom-7b1"
OUT = Path(__file__).with_name("results") / "build-belle-7b.json"
MOST_BYTES = 4_000_000_000
_POOL_VALUES = 16 << 20  # random numbers, of which each tensor repeats a part that begins elsewhere


def write_release(directory: Path, layers: int | None = None) -> Path:
    """A directory as BELLE-7B-2M's: config.json, a tokenizer, and pytorch_model.bin with a tied head. Returns the pickle."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    config = SHAPES[SHAPE] | COMMON["bloom"] | ({} if layers is None else {"n_layer": layers})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(directory, config["vocab_size"])
    file = directory / "pytorch_model.bin"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    tensors = {key: torch.empty(p.shape) for key, p in model.named_parameters()}  # memory that nothing ever touches
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    with torch.serialization.skip_data():
        torch.save(tensors, file)
    pool = np.random.default_rng(0).standard_normal(_POOL_VALUES, np.float32) * np.float32(STD)
    with file.open("r+b") as stream:
        for number, tensor in enumerate(open_pickle(file)):
            assert isinstance(tensor.load, StoredValues), "a state dict has plain tensors"
            _fill(stream, tensor.load.start, tensor.name, int(np.prod(tensor.shape)), np.roll(pool, 7919 * number))
    return file


def _fill(stream: Any, start: int, name: str, count: int, pool: Any) -> None:
    """Write random numbers, or the neutral ones of a norm, as the values of a tensor."""
    if "layernorm" in name or ".ln_f." in name:
        pool = np.full(count, 1.0 if name.endswith("weight") else 0.0, np.float32)
    stream.seek(start)
    while count:
        count -= stream.write(pool[:count].data) // pool.itemsize


def build(release: Path, engine: Path, control_group: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Build the release in a process of its own; returns what the build says of itself, and its command."""
    command = ["belle-compile", "build", str(release), "--target", "cpu", "-o", str(engine), "--json", "--quiet"]

    def join() -> None:
        if control_group is not None:
            (control_group / "cgroup.procs").write_text(str(os.getpid()))

    run = [sys.executable, "-m", "belle_compile.compiler", *command[1:]]
    began = time.perf_counter()
    made = json.loads(subprocess.run(run, capture_output=True, text=True, check=True, preexec_fn=join).stdout)
    figures = dict(made["build"])
    figures["wall_seconds"] = round(time.perf_counter() - began, 1)
    figures["largest_process_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if control_group is not None:
        figures["control_group"] = {
            name: int((control_group / f"memory.{name}").read_text())
            for name in ("limit_in_bytes", "max_usage_in_bytes", "failcnt")
        }
    return figures, command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="Fewer layers than the 30 of BELLE-7B.")
    parser.add_argument("--control-group", type=Path, help="A directory of the memory controller to run the build in.")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        began = time.perf_counter()
        file = write_release(folder / "BELLE-7B", arguments.layers)
        written, size = time.perf_counter() - began, file.stat().st_size
        print(f"{size:,} bytes written in {written:.0f} s", flush=True)
        figures, command = build(file.parent, folder / "engine", arguments.control_group)
        engine_bytes = sum(each.stat().st_size for each in (folder / "engine").rglob("*") if each.is_file())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = describe()
    result = {
        "checkpoint": {
            "shape": "BELLE-7B-2M: BLOOM, 30 layers, 4096 wide, 250,880 tokens" if arguments.layers is None else "fewer layers",
            "file": "pytorch_model.bin, one pickle in float32, as PyTorch 1.6 and later write them",
            "bytes": size,
            "seconds_to_write": round(written, 1),
        },
        "build": figures,
        "build_command": " ".join(command),
        "engine_bytes": engine_bytes,
        "allowed_bytes": MOST_BYTES,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "machine": machine,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
