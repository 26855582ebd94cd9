"""Lowering: which kernels a graph gets, and the buffers between them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler import targets
from belle_compile.compiler.backends import CompileOptions
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm import TvmBackend, library
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.group_linear import GroupLinear
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.lower import lower
from belle_compile.compiler.backends.tvm.tuning.table import TilingTable
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.partition import channels
from belle_compile.passes.pipeline import at_fusion, run_pipeline, run_ranks
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import WeightScheme
from belle_compile.runtime.program import AllReduce
from belle_compile.runtime.program_json import program_from_json, program_to_json
from tests.passes import helpers
from tests.passes.helpers import HEAD_DIM, llama
from tests.pipelines import PIPELINES


@pytest.mark.parametrize(
    ("group", "zeros", "found"),
    [(64, False, "groups of 64 inputs and no zero points"), (128, True, "groups of 128 inputs and zero points")],
)
def test_groups_that_no_kernel_computes(group: int, zeros: bool, found: str) -> None:
    model = llama(layers=1)
    run_pipeline(model, [QuantizeGroups(weights=WeightScheme(4, group)), QuantizeLinears(), FuseDequantize()])
    model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim=str(HEAD_DIM), max_position="64")
    (node,) = [node for node in model.graph if node.name == "layers.0.attn.o"]
    if zeros:
        scales = operand(node, Role.GROUP_SCALE)
        assert scales is not None and scales.shape is not None
        node.resize_inputs(6)
        node.replace_input_with(5, make_initializer(ir.Tensor(np.zeros(scales.shape.numpy(), np.int8), name="zeros")))
    message = rf"^tvm: op GroupQuantizedLinear \(node .*\): found {found}, expected groups of 128 inputs and no zero points\.$"
    with pytest.raises(CompileError, match=message):
        lower(model, 0)


def test_layers_with_activations_of_8_and_16_bits_in_one_program() -> None:
    """Only what the wide linear reads has two planes; the kernel before it writes them."""
    model = llama(layers=1)
    wide = QuantizeLinears(wide=("*.down",))
    run_pipeline(model, [wide if isinstance(step, QuantizeLinears) else step for step in PIPELINES["int8"]])
    model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim=str(HEAD_DIM), max_position="64")
    program, _, kernels, _ = lower(model, calls_before_fusion=0)
    by_name = {kernel.name: kernel for kernel in kernels}
    chosen = {call.node: by_name[str(call.kernel)] for call in program.calls}
    planes = {node: kernel.planes for node, kernel in chosen.items() if isinstance(kernel, QuantizedLinear)}
    down = chosen["layers.0.mlp.down"]
    assert isinstance(down, QuantizedLinear) and down.x == View(2 * 64)
    assert planes.pop("layers.0.mlp.down") == 2 and set(planes.values()) == {1} and len(planes) == 4
    assert getattr(chosen["layers.0.mlp.act"], "planes", 0) == 2
    assert getattr(chosen["layers.0.mlp.act"], "out", None) == down.x


def test_int4_weights_take_half_a_byte_and_a_scale_for_128() -> None:
    model = llama(layers=1)
    run_pipeline(model, PIPELINES["int4"])
    model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim=str(HEAD_DIM), max_position="64")
    program, weights, kernels, _ = lower(model, calls_before_fusion=0)
    assert program.kv.dtype == "bfloat16"
    assert sum(isinstance(kernel, GroupLinear) for kernel in kernels) == 4
    fused = {weight.name.rpartition(".")[2]: (weight.dtype, weight.shape) for weight in weights if "gate+up" in weight.name}
    assert fused == {"int4": ("uint8", (6, 8, 16, 4)), "scales": ("float16", (6, 1, 16))}
    assert [weight.dtype for weight in weights if "lm_head" in weight.name and weight.name.endswith(".int8")] == ["int8"]
    for weight in weights:
        packed = weight.pack()
        assert (packed.dtype.name, packed.shape) == (weight.dtype, weight.shape) and packed.nbytes % 64 == 0


def ranks_of(count: int, monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> list[ir.Model]:
    """A small LLaMA's, with 32 channels in its feed-forward part for each of two ranks, or 32 and 16."""
    monkeypatch.setattr(helpers, "VOCABULARY", vocabulary)
    model = llama(layers=1)
    before, fusions = at_fusion(PIPELINES["int8-plain"])
    run_pipeline(model, before)
    model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim=str(HEAD_DIM), max_position="64")
    return run_ranks(model, fusions, count)[0]


def test_sums_over_ranks_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ranks_of(2, monkeypatch, 40)
    programs = [lower(model, calls_before_fusion=0)[0] for model in models]
    assert [(p.rank, p.ranks, p.vocab_size, p.logits.first, p.logits.count) for p in programs] == [
        (0, 2, 40, 0, 32), (1, 2, 40, 32, 8),
    ]  # fmt: skip
    for program in programs:
        assert program_from_json(program_to_json(program)) == program
        sums = [at for at, call in enumerate(program.calls) if call.all_reduce]
        assert [program.calls[at].node for at in sums] == [
            "embed.all_reduce", "layers.0.attn.o.all_reduce", "layers.0.mlp.down.all_reduce",
        ]  # fmt: skip
        for at in sums:
            call, writer = program.calls[at], program.calls[at - 1]
            assert call.args == writer.args[-1:] and call.kernels() == ()
            assert call.all_reduce == AllReduce(width=32, stride=80)


def test_ranks_with_the_same_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed-forward part of 48 channels is uneven, that of 64 is not."""
    compiled: list[int] = []

    def compile_library(kernels: list[Kernel], isa: Isa, tilings: TilingTable) -> bytes:
        compiled.append(len(kernels))
        return b"so"

    monkeypatch.setattr(library, "compile_library", compile_library)
    avx2 = targets.parse("cpux2").carrying(("avx2",))
    TvmBackend().compile(ranks_of(2, monkeypatch, 64), avx2, CompileOptions())
    uneven = len(compiled)
    compiled.clear()
    monkeypatch.setattr(channels, "CHANNELS", 24)
    one, other = TvmBackend().compile(ranks_of(2, monkeypatch, 64), avx2, CompileOptions())
    assert uneven == 2 * len(compiled) > 0
    libraries = [bytes(payload.files["kernels-avx2.so"]) for payload in (one, other)]
    assert [library[:-64] for library in libraries] == [b"so", b"so"] and libraries[0] != libraries[1], "but for the seals"


def test_heads_of_an_odd_size_have_a_float16_cache() -> None:
    """bfloat16 lies in pairs."""

    def lowered(kv_cache: str) -> str:
        model = llama(layers=1)
        run_pipeline(model, PIPELINES["int8"])
        model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim="5", max_position="64")
        return lower(model, calls_before_fusion=0, kv_cache=kv_cache).program.kv.dtype

    assert lowered("auto") == "float16"
    with pytest.raises(CompileError, match=r"^kv cache: bfloat16 is not available: found heads of 5 for the backend tvm"):
        lowered("bfloat16")
