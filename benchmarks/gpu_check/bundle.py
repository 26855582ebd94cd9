"""Makes the bundle that a GPU host needs: small engines with the answers expected of them, and a 7B model without weights.

python -m benchmarks.gpu_check.bundle --target h100 build/gpu-check      # 10 minutes on 2 cores, no GPU; 72 MB
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from belle_compile.compiler import targets
from belle_compile.compiler.backends import CompileOptions
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.cache import BLOCK_SIZE, PagedCache
from belle_compile.compiler.ir.evaluate import evaluate
from belle_compile.compiler.plan.outline import outline
from belle_compile.compiler.stages import carried
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import PRESETS
from belle_compile.runtime.adapters.basis import EngineBasis
from belle_compile.runtime.adapters.factors import Factors
from benchmarks import checkpoints
from benchmarks.gpu_check import adapters
from benchmarks.gpu_check.checks import EXPECTED, GREEDY, LARGE, PROMPT, TOLERANCE
from benchmarks.gpu_check.provider import FOLDER
from benchmarks.lora import make_adapter

Floats = npt.NDArray[np.float32]

# BELLE-7B and BELLE-LLaMA in small: heads of 64 and 128 channels, one head for several, a vocabulary of several chunks.
SMALL: dict[str, dict[str, Any]] = {
    "bloom-small": {"model_type": "bloom", "hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 2051},
    "llama-small": {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "intermediate_size": 704, "vocab_size": 2051},
}  # fmt: skip
# What layers add outweighs the token itself, or greedy decoding would repeat one token, most of all where the head is tied.
SCALES = {"query_key_value.weight": 2.0, "attention.dense.weight": 40.0, "4h_to_h.weight": 20.0, "o_proj.weight": 4.0}
DISTINCT = 40  # of GREEDY tokens at least
MARGIN = 2 * TOLERANCE["none"][0]  # by which the likeliest token leads: an error that is tolerated changes no token
SEEDS = 30


def make(out: Path, target: str) -> None:
    """Write the bundle; what is there is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as folder:
        for shape in SMALL:
            checkpoint, ids = _checkpoint(shape, Path(folder))
            for preset in ("none", "int8"):
                _small(checkpoint, ids, preset, out / f"{shape}-{preset}", target)
                _of_provider(checkpoint, preset, out, f"{shape}-{preset}", target)
                _with_adapters(checkpoint, ids, preset, out / adapters.FOLDER / f"{shape}-{preset}", target)
    _large(out / LARGE, out / LARGE, target)
    _large(out / LARGE, out / FOLDER / LARGE / "rank0", target, FOLDER)
    arch = targets.parse(target).isas[0]
    (out / "bundle.json").write_text(json.dumps({"target": target, "arch": arch}) + "\n")


def _checkpoint(shape: str, folder: Path) -> tuple[Path, list[int]]:
    """Random weights, the first that answer a prompt with many tokens of which none is nearly a tie; and the prompt."""
    checkpoints.SHAPES[shape] = SMALL[shape]
    made = checkpoints.make(shape, folder / shape)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = [int(token) for token in np.random.default_rng(1).integers(5, 250, PROMPT)]
    for seed in range(SEEDS):
        _fill(model, seed)
        logits, tokens = _answer(model, ids)
        best = np.sort(logits[PROMPT - 1 :], axis=1)
        margin = float((best[:, -1] - best[:, -2]).min() / np.abs(logits).max())
        if len(set(tokens)) >= DISTINCT and margin > MARGIN:
            break
    else:
        raise SystemExit(f"{shape}: none of {SEEDS} random models has {DISTINCT} different tokens in its answer and no ties")
    print(f"{shape}: seed {seed}, {len(set(tokens))} different tokens of {len(tokens)}, margin {margin:.1e}", flush=True)
    filled = folder / f"{shape}-filled"  # the weights of the first are mapped
    model.save_pretrained(filled)
    for file in made.glob("token*"):
        shutil.copy(file, filled)
    return filled, ids


def _fill(model: Any, seed: int) -> None:
    """Weights under which nothing is near its neutral value: no norm 1, no bias 0, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key or ".ln_f." in key:
                parameter.copy_(0.2 * noise + (1.0 if key.endswith("weight") else 0.0))
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                scale = next((scale for end, scale in SCALES.items() if key.endswith(end)), 1.5)
                parameter.copy_(noise * scale / parameter.shape[1] ** 0.5)


def _answer(model: Any, ids: Sequence[int]) -> tuple[Floats, list[int]]:
    """Logits of the prompt and of all but the last token after it, and these tokens, by Transformers."""
    with torch.no_grad():
        answer = model.generate(torch.tensor([ids]), do_sample=False, min_new_tokens=GREEDY, max_new_tokens=GREEDY)
        logits: Floats = model(answer[:, :-1]).logits[0].numpy()
    return logits, answer[0, PROMPT:].tolist()


def _small(checkpoint: Path, ids: Sequence[int], preset: str, out: Path, target: str) -> None:
    """An engine, with the logits of a prompt and the greedy tokens after it."""
    build(BuildRequest(checkpoint, out, target, preset, drift=False))
    if preset == "none":
        logits, tokens = _answer(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), ids)
    else:
        logits, tokens = _meaning(checkpoint, preset, ids)
    np.savez(out / EXPECTED, ids=ids, logits=logits, tokens=tokens)
    print(f"{out.name}: {len(set(tokens))} different tokens of {len(tokens)}", flush=True)


def _of_provider(checkpoint: Path, preset: str, out: Path, name: str, target: str) -> None:
    """The engine of ONNX Runtime that has the answers of another engine."""
    build(BuildRequest(checkpoint, out / FOLDER / name, target, preset, backend=FOLDER, drift=False))
    shutil.copy(out / name / EXPECTED, out / FOLDER / name)


def _with_adapters(checkpoint: Path, ids: Sequence[int], preset: str, out: Path, target: str) -> None:
    """An engine that takes adapters, some of random values, and the logits of a prompt with each of them and with none, by the
    NumPy meaning of its graph."""
    build(BuildRequest(checkpoint, out, target, preset, drift=False, lora_rank=adapters.RANK))
    basis = EngineBasis.read(out)
    for number, name in enumerate(adapters.NAMES):
        make_adapter(out / name, basis, adapters.RANK - 5 * number, [[], ["q_proj", "query_key_value"], []][number], number)
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, passes_of(PRESETS[preset].recipe, lora_rank=adapters.RANK))
    text = list(ids[: adapters.TOKENS])
    logits = []
    for changes in (*(adapters.changes_of(out, name) for name in adapters.NAMES), {}):
        cache, table = _cache(graph, len(text), "float32" if preset == "none" else "float16")
        logits.append(_evaluate(graph, cache, table, text, 0, _Changes(changes)))
    np.savez(out / EXPECTED, ids=text, logits=logits)


class _Changes:
    """The changes of one adapter, which all sequences have."""

    def __init__(self, changes: Mapping[str, Factors]) -> None:
        self._changes = changes

    def factors(self, sequence: int, target: str) -> Factors | None:
        """The factors for a linear; None if the adapter does not change it."""
        return self._changes.get(target)


def _cache(graph: ir.Model, tokens: int, kv_type: str) -> tuple[PagedCache, npt.NDArray[np.int32]]:
    """A cache for one sequence of so many tokens, and its block table."""
    layers, kv_heads, head_dim = (int(graph.metadata_props[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    blocks = -(-tokens // BLOCK_SIZE)
    return PagedCache(layers, kv_heads, head_dim, blocks, kv_type), np.arange(blocks, dtype=np.int32)[None]


def _evaluate(
    graph: ir.Model,
    cache: PagedCache,
    table: npt.NDArray[np.int32],
    tokens: Sequence[int],
    start: int,
    changes: _Changes | None = None,
) -> Floats:
    """The logits after each of some tokens that follow `start` others."""
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    inputs = {
        "token_ids": np.array(tokens, np.int32), "positions": positions, "sequences": np.zeros_like(positions),
        "block_table": table, "logit_rows": np.arange(len(tokens), dtype=np.int32),
    }  # fmt: skip
    found: Floats = evaluate(graph, inputs, cache, adapters=changes)["logits"]
    return found


def _meaning(checkpoint: Path, preset: str, ids: Sequence[int]) -> tuple[Floats, list[int]]:
    """The same by the NumPy meaning of the graph, with a cache of float16."""
    graph = build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, passes_of(PRESETS[preset].recipe))
    cache, table = _cache(graph, PROMPT + GREEDY, "float16")
    logits = [_evaluate(graph, cache, table, ids, 0)]
    answer = [int(logits[0][-1].argmax())]
    while len(answer) < GREEDY:
        logits.append(_evaluate(graph, cache, table, answer[-1:], PROMPT + len(answer) - 1))
        answer.append(int(logits[-1][0].argmax()))
    return np.concatenate(logits), answer


def _large(folder: Path, out: Path, target: str, name: str | None = None) -> None:
    """A backend's files for a 7B model, whose config.json is written to `folder`, and the header of the weights that the GPU
    host makes up."""
    out.mkdir(parents=True)
    config = checkpoints.SHAPES[LARGE] | checkpoints.COMMON[checkpoints.SHAPES[LARGE]["model_type"]]
    (folder / "config.json").write_text(json.dumps(config))
    graph = build_graph(outline(folder / "config.json"))
    unfused = graph.clone()
    parsed, backend = targets.choose(target, name)
    recipe = PRESETS["int8"].recipe
    # An engine of the backend of programs takes adapters, whose time is measured too.
    rank = 0 if backend.adapter_refusal(parsed) else adapters.LARGE_RANK
    before, fusions = carried(passes_of(recipe, lora_rank=rank), backend, recipe)
    run_pipeline(graph, (*before, *fusions))
    (payload,) = backend.compile([graph], parsed, CompileOptions(unfused_calls=backend.kernel_calls(unfused)))
    for name, content in payload.files.items():
        (out / name).write_bytes(content)
    (out / "weights.header").write_bytes(weights_header(payload.tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    hf_logging.disable_progress_bar()
    make(arguments.out, arguments.target)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB for {arguments.target}")


if __name__ == "__main__":
    main()
