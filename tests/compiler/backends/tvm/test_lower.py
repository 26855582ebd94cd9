"""Lowering: which kernels a graph gets, and the buffers between them."""

from __future__ import annotations

from compiler.backends.tvm.kernels.base import View
from compiler.backends.tvm.kernels.group_linear import GroupLinear
from compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from compiler.backends.tvm.lower import lower
from passes.pipeline import PRESETS, run_pipeline
from passes.quantization.quantize_linears import QuantizeLinears
from tests.passes.helpers import HEAD_DIM, llama


def test_layers_with_activations_of_8_and_16_bits_in_one_program() -> None:
    """Only what the wide linear reads has two planes; the kernel before it writes them."""
    model = llama(layers=1)
    wide = QuantizeLinears(wide=("*.down",))
    run_pipeline(model, [wide if isinstance(step, QuantizeLinears) else step for step in PRESETS["int8"]])
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
    run_pipeline(model, PRESETS["int4"])
    model.metadata_props.update(num_layers="1", num_kv_heads="2", head_dim=str(HEAD_DIM), max_position="64")
    program, weights, kernels, _ = lower(model, calls_before_fusion=0)
    assert program.kv.dtype == "float16"
    assert sum(isinstance(kernel, GroupLinear) for kernel in kernels) == 4
    fused = {weight.name.rpartition(".")[2]: (weight.dtype, weight.shape) for weight in weights if "gate+up" in weight.name}
    assert fused == {"int4": ("uint8", (6, 8, 16, 4)), "scales": ("float16", (6, 1, 16))}
    assert [weight.dtype for weight in weights if "lm_head" in weight.name and weight.name.endswith(".int8")] == ["int8"]
    for weight in weights:
        packed = weight.pack()
        assert (packed.dtype.name, packed.shape) == (weight.dtype, weight.shape) and packed.nbytes % 64 == 0
