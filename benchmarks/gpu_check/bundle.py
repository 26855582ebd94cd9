"""Makes the bundle that a GPU host needs: small engines with the answers expected of them, and a 7B model without weights.

python -m benchmarks.gpu_check.bundle --target h100 build/gpu-check      # 4 minutes on 2 cores, no GPU
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks import checkpoints
from compiler import targets
from compiler.backends import compile_graphs, count_kernel_calls
from compiler.checkpoint import open_checkpoint
from compiler.driver import BuildRequest, build
from compiler.frontends import build_graph
from compiler.ir.cache import BLOCK_SIZE, PagedCache
from compiler.ir.evaluate import evaluate
from compiler.plan.outline import outline
from compiler.writer import safetensors_header
from passes.pipeline import PRESETS, run_pipeline

# BELLE-7B and BELLE-LLaMA in small: heads of 64 and 128 channels, one head for several, a vocabulary of several chunks.
SMALL: dict[str, dict[str, Any]] = {
    "bloom-small": {"model_type": "bloom", "hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 5003},
    "llama-small": {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 5003},
}  # fmt: skip
LARGE = "bloom-7b1"
PROMPT, GREEDY = 96, 64
SPREAD = 6.0  # random weights times this: likelier tokens, so that those that are greedily chosen are no ties


def make(out: Path, target: str) -> None:
    """Write the bundle; what is there is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as folder:
        for shape in SMALL:
            checkpoint = _checkpoint(shape, Path(folder) / shape)
            for preset in ("none", "int8"):
                _small(checkpoint, preset, out / f"{shape}-{preset}", target)
    _large(out / LARGE, target)
    arch = targets.parse(target).isas[0]
    (out / "bundle.json").write_text(json.dumps({"target": target, "arch": arch}) + "\n")


def _checkpoint(shape: str, folder: Path) -> Path:
    checkpoints.SHAPES[shape] = SMALL[shape]
    made = checkpoints.make(shape, folder)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(SPREAD)
    spread = folder.with_name(f"{folder.name}-spread")  # the weights of the first are mapped
    model.save_pretrained(spread)
    for file in made.glob("token*"):
        shutil.copy(file, spread)
    return spread


def _small(checkpoint: Path, preset: str, out: Path, target: str) -> None:
    """An engine, with the logits of a prompt and the greedy tokens after it."""
    build(BuildRequest(checkpoint, out, target, preset, drift=False))
    ids = np.random.default_rng(1).integers(5, 250, PROMPT).tolist()
    if preset == "none":
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
            answer = model.generate(torch.tensor([ids]), do_sample=False, min_new_tokens=GREEDY, max_new_tokens=GREEDY)
        tokens = answer[0, PROMPT:].tolist()
    else:
        logits, tokens = _meaning(checkpoint, preset, ids)
    np.savez(out / "expected.npz", ids=ids, logits=logits, tokens=tokens)


def _meaning(checkpoint: Path, preset: str, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[int]]:
    """The same by the NumPy meaning of the graph, with a cache of float16."""
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, PRESETS[preset])
    layers, kv_heads, head_dim = (int(graph.metadata_props[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    blocks = -(-(PROMPT + GREEDY) // BLOCK_SIZE)
    cache = PagedCache(layers, kv_heads, head_dim, blocks, "float16")
    table = np.arange(blocks, dtype=np.int32)[None]

    def step(tokens: Sequence[int], start: int) -> npt.NDArray[np.float32]:
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        inputs = {
            "token_ids": np.array(tokens, np.int32), "positions": positions, "sequences": np.zeros_like(positions),
            "block_table": table, "logit_rows": np.arange(len(tokens), dtype=np.int32),
        }  # fmt: skip
        found: npt.NDArray[np.float32] = evaluate(graph, inputs, cache)["logits"]
        return found

    logits = step(ids, 0)
    answer = [int(logits[-1].argmax())]
    while len(answer) < GREEDY:
        answer.append(int(step(answer[-1:], PROMPT + len(answer) - 1)[0].argmax()))
    return logits, answer


def _large(out: Path, target: str) -> None:
    """Program and kernels of a 7B model, and the header of the weights that the GPU host makes up."""
    out.mkdir()
    config = checkpoints.SHAPES[LARGE] | checkpoints.COMMON[checkpoints.SHAPES[LARGE]["model_type"]]
    (out / "config.json").write_text(json.dumps(config))
    graph = build_graph(outline(out / "config.json"))
    unfused = graph.clone()
    run_pipeline(graph, PRESETS["int8"])
    (lowered,) = compile_graphs([graph], targets.parse(target), calls_before_fusion=count_kernel_calls(unfused))
    (out / "program.json").write_text(lowered.program.to_json())
    for name, content in lowered.kernels.items():
        (out / name).write_bytes(content)
    (out / "weights.header").write_bytes(safetensors_header(lowered.weights)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make(arguments.out, arguments.target)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB for {arguments.target}")


if __name__ == "__main__":
    main()
