"""Which INT4 scheme keeps how much of SmolLM2-135M's accuracy at which bytes: rounded weights simulated in float32.

    python -m benchmarks.int4_schemes --writer build/engines/peers-smollm2-135m
    python -m benchmarks.int4_schemes --writer ENGINE --only formats      # one table, added to the results that are there

Weights are rounded by a format and dequantized, activations are rounded as the runtime does it: int8 with a scale a token.
llama.cpp's files are dequantized into the same model and computed with float32 activations, which is in their favour. Each row
is compared with the float32 model on the answers to the prompts of `benchmarks.peers.agree`, on Python's language
documentation and on Python code.

The checkpoint of SmolLM2 is a Q4_1 file expanded to float32: 32 neighbours of a row have at most 16 values, and a format with
such groups and minimums finds them again at no loss. So all rows but those of the table "aligned" are of a model that computes
the same with its channels shuffled, in which no group is a group of that file; llama.cpp's files are made of it as well.

Needs the peers' checkpoint of SmolLM2 and environments "llama" and "hf"; `--writer` is an INT8 engine of it, which writes the
requests that stand for calibration without requests. Writes results/int4-schemes.json.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.ir.meanings import block_hadamard
from belle_compile.compiler.request_writer import write_requests
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.passes.rotation.hadamard import Rotation
from belle_compile.runtime import Engine
from belle_compile.runtime.prompt import ChatTemplate
from benchmarks import machine
from benchmarks.engines import SMOLLM2
from benchmarks.peers.agree import LONGEST, QUESTIONS, tokenize
from benchmarks.peers.convert import prepare
from benchmarks.peers.home import MODELS, PeersError
from benchmarks.peers.rows import Row as PeerRow
from benchmarks.simulation import load_fp32
from benchmarks.text import windows
from benchmarks.weight_formats import Format

Tensor = torch.Tensor
RESULT = Path("benchmarks/results/int4-schemes.json")
HELD_OUT, CODE_WINDOWS, CALIBRATION = 6, 3, 32
FISHER_SEQUENCES = 16
UNITS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}  # read as one weight
INT8 = Format(8)


@dataclass(frozen=True)
class Scheme:
    """A row: formats of the layers, of the layers that hurt most, and of the table that embedding and head share.

    `layers` None leaves weights as they are. Layers get `better` in the order of their damage for each byte while all
    weights together take at most the bytes of the file `budget`. `calibration` is "none", "self" or "requests".
    `activations` is the number of inputs that share a scale (0: a token's; None: float32). Rotations are R1, R2 and R4 of the
    compiler; R1 keeps one table for embedding and head, by a product with [hidden, hidden] before the head.
    """

    layers: Format | None
    table: Format | None = INT8
    better: Format | None = None
    budget: str = ""
    calibration: str = "none"
    activations: int | None = 0
    rotations: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"layers {self.layers or 'float32'}", f"table {self.table or 'float32'}"]
        parts += [f"worst layers {self.better} at the bytes of {self.budget}"] if self.better else []
        scale = {None: "float32 activations", 0: "int8 activations a token"}
        parts.append(scale.get(self.activations, f"int8 activations in groups of {self.activations}"))
        parts += ["rotations " + ", ".join(self.rotations)] if self.rotations else []
        parts.append({"none": "nearest", "self": "GPTQ, own requests", "requests": "GPTQ, requests"}[self.calibration])
        return "; ".join(parts)


class RoundedLinear(torch.nn.Module):
    """A linear whose weight was rounded, with its inputs rotated where `rotate` is given, then rounded to int8."""

    def __init__(self, weight: Tensor, rotate: Tensor | None) -> None:
        super().__init__()
        self.weight, self.rotate = weight, rotate
        self.activations: int | None = None
        self.on_input: Callable[[Tensor], None] | None = None
        self.on_output: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rotate is None else x @ self.rotate
        if self.on_input is not None:
            self.on_input(x)
        y = torch.nn.functional.linear(x if self.activations is None else _rounded(x, self.activations), self.weight)
        if self.on_output is not None:
            self.on_output(y)
        return y


def _rounded(x: Tensor, group: int) -> Tensor:
    parts = x.view(*x.shape[:-1], -1, group or x.shape[-1])
    steps = parts.abs().amax(dim=-1, keepdim=True) / 127
    rounded: Tensor = torch.round(parts / torch.where(steps == 0, 1, steps)) * steps
    return rounded.flatten(-2)


@dataclass
class Basis:
    """The float32 model in one basis: rotated or not, with the second moments of inputs by calibration set, found once."""

    model: Any
    linears: dict[str, RoundedLinear]
    exact: dict[str, Tensor]
    table: Tensor
    extra_bytes: float
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fisher: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rounded: dict[tuple[str, Format, str], Tensor] = field(default_factory=dict)  # by calibration, format and linear


def in_basis(source: Any, rotations: Iterable[str]) -> Basis:
    """A copy of a LLaMA model with a tied head whose linears can be given other weights, rotated."""
    model, chosen = copy.deepcopy(source), set(rotations)
    hidden, head_size = model.config.hidden_size, model.config.head_dim
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table, final = model.model.embed_tokens.weight.clone(), model.model.norm
    before_head: Tensor | None = None
    extra = 0.0
    r1 = torch.from_numpy(Rotation(hidden, 0).right(torch.eye(hidden).numpy())) if "R1" in chosen else None
    r2 = torch.from_numpy(Rotation(head_size, 1).right(torch.eye(head_size).numpy())) if "R2" in chosen else None
    if r1 is not None:
        before_head, table, extra = r1.T @ (final.weight[:, None] * r1), table @ r1, 4.0 * hidden * hidden
        final.weight.fill_(1)
    for layer in model.model.layers:
        _rotate_layer(layer, r1, r2, head_size)
    linears = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            rotate = before_head if name == "lm_head" else None
            weight = table if name == "lm_head" else module.weight.data
            if "R4" in chosen and name.endswith("down_proj"):
                width = weight.shape[1]
                rotate = torch.from_numpy(block_hadamard(torch.eye(width).numpy(), block=width & -width))
                weight = weight @ rotate
            linears[name] = RoundedLinear(weight, rotate)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linears[name])
    model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)
    return Basis(model, linears, {name: linear.weight for name, linear in linears.items()}, table, extra)


def _rotate_layer(layer: Any, r1: Tensor | None, r2: Tensor | None, head_size: int) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if r2 is not None:
        value, output = attention.v_proj.weight, attention.o_proj.weight
        value.copy_((r2.T @ value.view(-1, head_size, value.shape[1])).view(value.shape))
        output.copy_((output.view(len(output), -1, head_size) @ r2).view(output.shape))
    if r1 is None:
        return
    readers = (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    )
    for norm, linears in readers:
        for linear in linears:
            linear.weight.copy_((linear.weight * norm.weight) @ r1)
        norm.weight.fill_(1)
    for linear in (attention.o_proj, mlp.down_proj):
        linear.weight.copy_(r1.T @ linear.weight)


def moments(basis: Basis, sequences: list[list[int]]) -> dict[str, Tensor]:
    """sum x x^T [K, K] of the inputs of each linear but the head; linears that read the same x share a tensor."""
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        found[name] = found[name].addmm_(rows.T, rows) if name in found else rows.T @ rows

    first = ("q_proj", "o_proj", "gate_proj", "down_proj")
    for name, linear in basis.linears.items():
        linear.on_input = (lambda x, name=name: add(name, x)) if name.endswith(first) else None
    with torch.inference_mode():
        for ids in sequences:
            basis.model.model(torch.tensor([ids]), use_cache=False)
    for name, linear in basis.linears.items():
        linear.on_input = None
        if name != "lm_head" and name not in found:
            found[name] = found[name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")]
    return found


def fisher(basis: Basis, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Mean square [N] of the gradient of -log p(token) at the outputs of each linear, for tokens that the model draws."""
    found = {name: torch.zeros(linear.weight.shape[0]) for name, linear in basis.linears.items() if name != "lm_head"}

    def watch(name: str, y: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            found[name] += gradient.flatten(0, -2).square().sum(0)

        y.register_hook(add)  # type: ignore[no-untyped-call]

    for name in found:
        basis.linears[name].on_output = lambda y, name=name: watch(name, y)
    generator, tokens = torch.Generator().manual_seed(0), 0
    for ids in sequences:
        values = basis.model.model.embed_tokens(torch.tensor([ids])).requires_grad_()
        logits = basis.model(inputs_embeds=values, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
        tokens += len(ids)
    for name in found:
        basis.linears[name].on_output = None
    return {name: total / tokens for name, total in found.items()}


@torch.no_grad()
def shuffled(source: Any) -> Any:
    """A LLaMA model that computes the same with other neighbours: its residual stream, feed-forward channels and the values of
    each head are permuted."""
    model, generator = copy.deepcopy(source), torch.Generator().manual_seed(0)
    config = model.config
    stream = torch.randperm(config.hidden_size, generator=generator)
    values = torch.randperm(config.head_dim, generator=generator)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream])
    model.model.norm.weight.copy_(model.model.norm.weight[stream])
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        channels = torch.randperm(config.intermediate_size, generator=generator)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[stream])
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[:, stream])
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(linear.weight[stream])
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[channels])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, channels])
        value, output = attention.v_proj.weight, attention.o_proj.weight
        value.copy_(value.view(-1, config.head_dim, value.shape[1])[:, values].reshape(value.shape))
        output.copy_(output.view(len(output), -1, config.head_dim)[:, :, values].reshape(output.shape))
    return model


def unit(name: str) -> str:
    """The linears that the compiler fuses into one share a format."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.{UNITS.get(child, child)}"


def apply(basis: Basis, scheme: Scheme, calibration: dict[str, list[list[int]]], budgets: dict[str, float]) -> dict[str, Any]:
    """Give the model the scheme's weights; returns the bytes of all weights and the units that got the better format."""
    head, layers = basis.linears["lm_head"], {name: basis.exact[name] for name in basis.linears if name != "lm_head"}
    table = basis.table
    table_bytes = 4.0 * table.numel() if scheme.table is None else scheme.table.bytes_of(*table.shape)
    rounded_table = table if scheme.table is None else scheme.table.round_nearest(table, torch.ones(table.shape[1]))
    head.weight = rounded_table
    basis.model.model.embed_tokens.weight.data = rounded_table
    rounded, sizes, better = dict(layers), {name: 4.0 * weight.numel() for name, weight in layers.items()}, []
    if scheme.layers is not None:
        rounded = {name: _round(basis, name, scheme.layers, scheme.calibration, calibration) for name in layers}
        sizes = {name: scheme.layers.bytes_of(*weight.shape) for name, weight in layers.items()}
        vectors = 4.0 * sum(parameter.numel() for parameter in basis.model.parameters() if parameter.ndim == 1)
        if scheme.better is not None:
            spare = budgets[scheme.budget] - table_bytes - basis.extra_bytes - vectors - sum(sizes.values())
            better = _choose(basis, scheme, rounded, sizes, spare, calibration)
            for name in (name for name in layers if unit(name) in better):
                rounded[name] = _round(basis, name, scheme.better, scheme.calibration, calibration)
                sizes[name] = scheme.better.bytes_of(*layers[name].shape)
        table_bytes += vectors
    for name, linear in basis.linears.items():
        linear.weight = rounded.get(name, linear.weight)
        linear.activations = scheme.activations
    return {"bytes": round(sum(sizes.values()) + table_bytes + basis.extra_bytes), "better_layers": sorted(better)}


def _round(basis: Basis, name: str, form: Format, chosen: str, calibration: dict[str, list[list[int]]]) -> Tensor:
    key = chosen, form, name
    if key not in basis.rounded:
        basis.rounded[key] = _round_anew(basis, name, form, chosen, calibration)
    return basis.rounded[key]


def _round_anew(basis: Basis, name: str, form: Format, chosen: str, calibration: dict[str, list[list[int]]]) -> Tensor:
    weight = basis.exact[name]
    if chosen == "none":
        return form.round_nearest(weight, torch.ones(weight.shape[1]))
    if chosen not in basis.moments:
        for linear in basis.linears.values():
            linear.activations = None
        for key, exact in basis.exact.items():
            basis.linears[key].weight = exact
        basis.model.model.embed_tokens.weight.data = basis.table
        basis.moments[chosen] = moments(basis, calibration[chosen])
        basis.fisher[chosen] = fisher(basis, calibration[chosen][:FISHER_SEQUENCES])
    return form.round_gptq(weight, basis.moments[chosen][name])


def _choose(
    basis: Basis, scheme: Scheme, rounded: dict[str, Tensor], sizes: dict[str, float], spare: float,
    calibration: dict[str, list[list[int]]],
) -> list[str]:  # fmt: skip
    """The units that get the better format within `spare` bytes: those with the greatest damage for each byte.

    The damage is the expected change of log p by the outputs' errors: sum over n of fisher[n] * (error H error^T)[n, n].
    Without calibration it is the squared error of the weights relative to their squares, times the number of outputs."""
    assert scheme.better is not None
    if spare < 0:
        raise SystemExit(f"int4_schemes: {scheme} does not fit: {-spare:,.0f} bytes too many.")
    damage, costs = dict[str, float](), dict[str, float]()
    for name, weight in rounded.items():
        error = basis.exact[name] - weight
        if scheme.calibration == "none":
            value = float(error.square().sum() / basis.exact[name].square().sum()) * len(weight)
        else:
            hessian, by_output = basis.moments[scheme.calibration][name], basis.fisher[scheme.calibration][name]
            value = float(((error @ hessian) * error).sum(1) @ by_output)
        damage[unit(name)] = damage.get(unit(name), 0.0) + value
        costs[unit(name)] = costs.get(unit(name), 0.0) + scheme.better.bytes_of(*weight.shape) - sizes[name]
    chosen = []
    for name in sorted(damage, key=lambda name: -damage[name] / costs[name]):
        if costs[name] <= spare:
            chosen.append(name)
            spare -= costs[name]
    return chosen


@dataclass(frozen=True)
class Judged:
    """A text and the first token of it from which predictions are compared."""

    kind: str
    ids: list[int]
    start: int


def judged_texts(model: Any, path: Path, encode: Callable[[str], list[int]]) -> list[Judged]:
    """Prompts with the float32 model's greedy answers, held-out documentation, and code."""
    found = []
    for prompt in tokenize(path):
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=LONGEST, do_sample=False)[0].tolist()
        found.append(Judged("prompts", answer, len(prompt) - 1))
    found += [Judged("documentation", ids, 0) for ids in windows(encode, 0, HELD_OUT)[1]]
    code = encode(inspect.getsource(argparse))
    return found + [Judged("code", code[i * 512 : (i + 1) * 512], 0) for i in range(CODE_WINDOWS)]


@torch.inference_mode()
def logits(model: Any, text: Judged) -> Tensor:
    """float32 [tokens, vocabulary] from the text's first judged token on."""
    result: Tensor = model(torch.tensor([text.ids]), use_cache=False).logits[0, text.start :]
    return result


def judge(model: Any, texts: list[Judged], exact: list[Tensor]) -> dict[str, Any]:
    """KL, agreement and perplexity for each kind of text."""
    found: dict[str, Comparison] = {}
    for text, reference in zip(texts, exact, strict=True):
        comparison = found.setdefault(text.kind, Comparison())
        comparison.add(reference, logits(model, text), text.ids[text.start :])
    return {kind: comparison.means() for kind, comparison in found.items()}


def own_requests(writer: Path, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Chats that an engine of the model writes, as token ids."""
    with Engine.load(writer) as engine:
        plain, requests = write_requests(engine, SelfWritten())
        template = ChatTemplate(engine.manifest.prompt_template)
    if plain:
        raise SystemExit(f"int4_schemes: {writer} has no chat template; give an engine of SmolLM2-135M-Instruct.")
    return [encode(template.render([{"role": "user", "content": each.text or ""}]) + each.answer) for each in requests]


SYM128, SYM32, ZERO32 = Format(4, 128), Format(4, 32), Format(4, 32, zeros=True)
ZERO64_8, ZERO32_8 = Format(4, 64, zeros=True, scale_bits=8), Format(4, 32, zeros=True, scale_bits=8)
MIN32_6 = Format(4, 32, scale_bits=6, minimums=True)
R24, R124 = ("R2", "R4"), ("R1", "R2", "R4")
TABLES: dict[str, tuple[Scheme, ...]] = {
    "budgets": (
        *(
            Scheme(form, INT8, INT8, budget, calibration, 0, R124)
            for calibration in ("requests", "self", "none")
            for form in (ZERO32_8, MIN32_6)
            for budget in ("q4_0", "q4_k_m")
        ),
        *(Scheme(SYM32, INT8, INT8, budget, "requests", 0, R124) for budget in ("q4_0", "q4_k_m")),
        *(Scheme(ZERO32_8, INT8, INT8, "q4_k_m", "requests", activations, R24) for activations in (0, 64)),
    ),
    "aligned": tuple(Scheme(form, activations=None) for form in (ZERO32, MIN32_6)),
    "formats": tuple(Scheme(form, activations=None) for form in (SYM128, SYM32, ZERO64_8, ZERO32, ZERO32_8, MIN32_6)),
    "activations": tuple(
        Scheme(None, None, activations=group, rotations=rotations)
        for group, rotations in ((0, ()), (64, ()), (0, R24), (64, R24), (0, R124))
    ),
    "tables": tuple(Scheme(None, table, activations=None) for table in (INT8, Format(6, 32), ZERO32)),
}


def peers(model: Path, texts: list[Judged], exact: list[Tensor]) -> tuple[dict[str, Any], dict[str, float]]:
    """llama.cpp's files: what they keep, and the bytes of their weights."""
    found, budgets = {}, {}
    for form, bits in (("q4_0", 4), ("q4_k_m", 4), ("q8_0", 8)):
        ready = prepare(PeerRow(f"llama.cpp {form}", "llama", bits, form), model)
        budgets[form] = ready.bytes_per_token  # the head is tied, so that a step reads all weights
        found[ready.row.name] = {"bytes": round(budgets[form]), "file": ready.engine.stat().st_size} | judge(
            load_fp32(ready.engine), texts, exact
        )
        _show(ready.row.name, found[ready.row.name])
    return found, budgets


def measured(
    titles: list[str], models: dict[bool, Any], judged: tuple[list[Judged], list[Tensor]],
    calibration: dict[str, list[list[int]]], budgets: dict[str, float],
) -> Iterator[tuple[str, Scheme, dict[str, Any]]]:  # fmt: skip
    """Every row of the tables, those of one basis after each other; `models` by whether their channels lie as in the file."""
    chosen = [(title, scheme) for title in titles for scheme in TABLES[title]]
    for is_aligned, rotations in dict.fromkeys((title == "aligned", scheme.rotations) for title, scheme in chosen):
        basis = in_basis(models[is_aligned], rotations)
        for title, scheme in chosen:
            if (title == "aligned", scheme.rotations) == (is_aligned, rotations):
                start = time.perf_counter()
                row = apply(basis, scheme, calibration, budgets) | judge(basis.model, *judged)
                yield title, scheme, row | {"seconds": round(time.perf_counter() - start, 1)}


def _show(name: str, row: dict[str, Any]) -> None:
    kls = ", ".join(f"{kind} {row[kind]['kl']:.4f}" for kind in ("prompts", "documentation", "code"))
    print(f"{row['bytes'] / 1e6:6.1f} MB  {kls}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writer", type=Path, required=True, help="INT8 engine that writes requests")
    parser.add_argument("--only", action="append", choices=TABLES, help="only this table; repeatable")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    path = MODELS / SMOLLM2
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    aligned = load_fp32(path)
    texts = judged_texts(aligned, path, encode)
    exact = [logits(aligned, text) for text in texts]
    source = shuffled(aligned)
    checkpoint = Path("build/checkpoints") / f"{SMOLLM2}-shuffled"
    source.save_pretrained(checkpoint)
    for name in ("config.json", "tokenizer.json"):  # Transformers writes a newer form of config.json than the converter reads
        shutil.copyfile(path / name, checkpoint / name)
    try:
        rows, budgets = peers(checkpoint, texts, exact)
        aligned_rows, _ = peers(path, texts, exact)
    except PeersError as error:
        raise SystemExit(f"int4_schemes: {error}.") from None
    calibration = {"self": own_requests(arguments.writer, encode), "requests": windows(encode, CALIBRATION, 0)[0]}
    report: dict[str, Any] = {"model": SMOLLM2, "questions": len(QUESTIONS), "held_out": HELD_OUT, "code": CODE_WINDOWS,
              "calibration": {name: len(given) for name, given in calibration.items()}, "machine": machine.describe(),
              "shuffled": judge(source, texts, exact), "peers": rows, "aligned_peers": aligned_rows, "tables": {}}  # fmt: skip
    if arguments.only and arguments.out.is_file():
        report["tables"] = json.loads(arguments.out.read_text())["tables"]
    titles = arguments.only or list(TABLES)
    report["tables"] |= {title: {} for title in titles}
    for title, scheme, row in measured(titles, {True: aligned, False: source}, (texts, exact), calibration, budgets):
        report["tables"][title][str(scheme)] = row
        _show(f"{title}: {scheme}", row)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
