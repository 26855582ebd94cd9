"""Lowering: which kernels a graph gets, and the buffers between them."""

from __future__ import annotations

from compiler.backends.tvm.kernels.base import View
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
