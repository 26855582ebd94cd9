"""Small graphs with random weights, and the checks every pass must stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.evaluate import PagedCache, evaluate
from belle_compile.compiler.ir.meanings import LowRankChanges
from belle_compile.compiler.ir.signature import TensorSpec
from belle_compile.compiler.ir.text import to_text
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.base import Pass, PassResult

HIDDEN, VOCABULARY, HEADS, HEAD_DIM = 32, 40, 4, 8
LINEAR = {"transB": 1}


class Tiny(GraphBuilder):
    """A graph between an embedding, `self.x` [T, 32], and a head."""

    def __init__(self, name: str = "tiny") -> None:
        super().__init__(name)
        self._random = np.random.default_rng(7)
        self.x = self.op("Gather", self.random("embed.weight", VOCABULARY, HIDDEN), self.inputs.token_ids, name="embed")

    def random(self, name: str, *shape: int) -> ir.Value:
        """A random weight of that name, the same in every run; products with a matrix keep the size of their input."""
        spread = shape[1] ** -0.5 if len(shape) == 2 and name != "embed.weight" else 1.0
        return self.weight(name, (spread * self._random.standard_normal(shape)).astype(np.float32))

    def linear(self, x: ir.Value, name: str, width: int, bias: bool = False) -> ir.Value:
        """A Gemm with its weight <name>.weight and, if asked for, <name>.bias."""
        inputs = int(x.shape[-1]) if x.shape is not None else 0  # type: ignore[call-overload]
        weights = [self.random(f"{name}.weight", width, inputs)] + ([self.random(f"{name}.bias", width)] if bias else [])
        return self.op("Gemm", x, *weights, name=name, **LINEAR)

    def norm(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        """LayerNormalization with bias for "layer", RMSNormalization for "rms"."""
        weights = [self.random(f"{name}.weight", HIDDEN)] + ([self.random(f"{name}.bias", HIDDEN)] if kind == "layer" else [])
        return self.op("LayerNormalization" if kind == "layer" else "RMSNormalization", x, *weights, name=name, epsilon=1e-5)

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, name: str, layer: int, **tables: ir.Value) -> ir.Value:
        """Attention of 4 heads over as many key/value heads as k has; tables are cos_sin or slopes."""
        kv_heads = int(k.shape[-1]) // HEAD_DIM if k.shape is not None else 0  # type: ignore[call-overload]
        step = self.inputs
        return self.op(
            "Attention", q, k, v, step.positions, step.sequences, step.block_table, tables.get("cos_sin"), tables.get("slopes"),
            name=name, layer=layer, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5,
        )  # fmt: skip

    def head(self, x: ir.Value, tied: bool = False) -> ir.Model:
        """The model: the wanted rows of x times the head's weight, which is the embedding's if tied."""
        rows = self.op("Gather", x, self.inputs.logit_rows, name="rows")
        if tied:
            return self.finish(self.op("Gemm", rows, self.graph.initializers["embed.weight"], name="lm_head", **LINEAR))
        return self.finish(self.linear(rows, "lm_head", VOCABULARY))


def llama(layers: int = 2, last_norm: bool = False) -> ir.Model:
    """RMSNorm, RoPE, grouped-query attention, SwiGLU, untied head; optionally a norm of the rows before it."""
    b = Tiny("llama")
    x = b.x
    inverse = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    step = b.inputs
    table = b.op("RotaryTable", step.positions, step.sequences, b.weight("inv_freq", inverse.astype(np.float32)), name="rotary")
    for layer in range(layers):
        at = f"layers.{layer}"
        n = b.norm(x, f"{at}.input_norm", "rms")
        q, k, v = (b.linear(n, f"{at}.attn.{part}", width) for part, width in (("q", 32), ("k", 16), ("v", 16)))
        x = b.op(
            "Add",
            x,
            b.linear(b.attention(q, k, v, f"{at}.attn", layer, cos_sin=table), f"{at}.attn.o", 32),
            name=f"{at}.add_attn",
        )
        n = b.norm(x, f"{at}.post_norm", "rms")
        gate, up = b.linear(n, f"{at}.mlp.gate", 48), b.linear(n, f"{at}.mlp.up", 48)
        x = b.op("Add", x, b.linear(b.op("SwiGLU", gate, up, name=f"{at}.mlp.act"), f"{at}.mlp.down", 32), name=f"{at}.add_mlp")
    if not last_norm:
        return b.head(x)
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    return b.finish(b.linear(b.norm(rows, "norm", "rms"), "lm_head", VOCABULARY))


def bloom(layers: int = 2, residual_after_norm: bool = False, last_norm: bool = False) -> ir.Model:
    """LayerNorm, ALiBi, fused QKV, Gelu, tied head; optionally apply_residual_connection_post_layernorm and a last norm."""
    b = Tiny("bloom")
    x = b.norm(b.x, "embed_norm", "layer")
    slopes = b.weight("slopes", (0.5 ** np.arange(1, HEADS + 1)).astype(np.float32))
    for layer in range(layers):
        at = f"h.{layer}"
        n = b.norm(x, f"{at}.input_norm", "layer")
        q, k, v = b.split(b.linear(n, f"{at}.attn.qkv", 96, bias=True), [32, 32, 32], f"{at}.attn.split")
        attended = b.linear(b.attention(q, k, v, f"{at}.attn", layer, slopes=slopes), f"{at}.attn.dense", 32, bias=True)
        x = b.op("Add", attended, n if residual_after_norm else x, name=f"{at}.add_attn")
        n = b.norm(x, f"{at}.post_norm", "layer")
        inner = b.op("Gelu", b.linear(n, f"{at}.mlp.up", 48, bias=True), name=f"{at}.mlp.gelu", approximate="tanh")
        x = b.op("Add", b.linear(inner, f"{at}.mlp.down", 32, bias=True), n if residual_after_norm else x, name=f"{at}.add_mlp")
    if not last_norm:
        return b.head(x, tied=True)
    normed = b.norm(b.op("Gather", x, b.inputs.logit_rows, name="rows"), "norm", "layer")
    return b.finish(b.op("Gemm", normed, b.graph.initializers["embed.weight"], name="lm_head", **LINEAR))


def run_steps(model: ir.Model, adapters: LowRankChanges | None = None) -> list[npt.NDArray[Any]]:
    """Logits of two steps: prompts of 5 and 18 tokens (the second crosses a block), then one more token of each."""
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    kv_heads = attentions[0].attributes["num_kv_heads"].as_int() if attentions else 1
    cache = PagedCache(max(1, len(attentions)), kv_heads, HEAD_DIM, num_blocks=5)
    block_table = np.array([[3, 4], [0, 2]], np.int32)
    lengths = (5, 18)
    first = [np.concatenate([np.arange(length) for length in lengths]), np.repeat([0, 1], lengths), np.array([4, 22])]
    second = [np.array(lengths), np.array([0, 1]), np.array([0, 1])]
    ids = np.random.default_rng(3).integers(0, VOCABULARY, sum(lengths) + 2)
    results = []
    for tokens, (positions, sequences, rows) in ((ids[:-2], first), (ids[-2:], second)):
        arrays = {"token_ids": tokens, "positions": positions, "sequences": sequences, "logit_rows": rows}
        inputs = {name: array.astype(np.int32) for name, array in arrays.items()} | {"block_table": block_table}
        results.append(evaluate(model, inputs, cache, adapters=adapters)["logits"])
    return results


def assert_same_results(before: ir.Model, after: ir.Model, *, rtol: float = 0.0) -> None:
    """The logits of both graphs agree to `rtol` of the largest one; bit for bit by default."""
    for expected, found in zip(run_steps(before), run_steps(after), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def check_pass(step: Pass, model: ir.Model) -> tuple[ir.Model, PassResult]:
    """Run a pass; returns the graph as it was and the result.

    Checks that the graph verifies, that its interface is unchanged, and that a second run changes nothing and
    refuses the same.
    """
    before = model.clone()
    result = step.run(model)
    verify(model)
    assert _interface(model) == _interface(before)
    text = to_text(model)
    again = step.run(model)
    assert again == PassResult(0, result.refusals)
    assert to_text(model) == text
    if not result.changes:
        assert text == to_text(before)
    return before, result


def side_by_side(before: ir.Model, step: Pass, after: ir.Model) -> str:
    """The text of a golden test."""
    return f"{to_text(before)}\n-- {step.name} --\n\n{to_text(after)}"


def count(model: ir.Model, op: str) -> int:
    """How many nodes of that op the graph has."""
    return sum(node.op_type == op for node in model.graph)


def _interface(model: ir.Model) -> list[tuple[str, str]]:
    return [(str(value.name), str(TensorSpec.of(value))) for value in (*model.graph.inputs, *model.graph.outputs)]
