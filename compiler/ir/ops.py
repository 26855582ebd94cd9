"""The ops of a graph: standard ones where ONNX has them, those of the domain `belle` where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import meanings, signature
from belle_compile.compiler.ir.constants import GROUP
from belle_compile.compiler.ir.signature import Operand, Role, TensorSpec

ONNX_OPSET = 23
BELLE = "belle"
BELLE_OPSET = 1

ShapeRule = Callable[[Sequence["TensorSpec | None"], ir.Node], list[TensorSpec]]


@dataclass(frozen=True)
class Attribute:
    """An op's attribute: its Python `type`, its `default` (None: nodes must give it) and the values `allowed` (empty: all)."""

    type: type[int] | type[float] | type[str]
    default: int | float | str | None = None
    allowed: tuple[int | float | str, ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """One op: its operands, attributes and meaning.

    `takes` and `gives` are signatures (see signature.py), which are also the shape rule unless `rule` replaces it.

    `meaning` is called with the inputs in order (None for one left out) and, by name, the attributes in `meaningful`. For a
    stateful op it also takes `cache`, the PagedCache; for an op of adapters `adapters`, a LowRankChanges or None; for a
    collective op it takes the list of inputs of all ranks in order.
    """

    domain: str
    name: str
    takes: str
    gives: str
    meaning: Callable[..., Any]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    stateful: bool = False
    collective: bool = False
    adapted: bool = False
    rule: ShapeRule | None = None
    variadic: bool = False

    @cached_property
    def inputs(self) -> tuple[Operand, ...]:
        return signature.parse(self.takes)

    @cached_property
    def outputs(self) -> tuple[Operand, ...]:
        return signature.parse(self.gives)

    @cached_property
    def meaningful(self) -> frozenset[str]:
        """The attributes that an implementation depends on."""
        return frozenset(
            name for name, attribute in self.attributes.items() if not attribute.allowed or name in ("kind", "bits")
        )

    def operands(self, node: ir.Node) -> list[tuple[Operand, ir.Value | None]]:
        """Pair each input operand of the op with the value that a node of this op has for it; None for one left out."""
        given = [*node.inputs, *[None] * (len(self.inputs) - len(node.inputs))]
        return list(zip(self.inputs, given, strict=True))

    def index(self, role: Role) -> int | None:
        """The position of the first input with that role; None where the op has none."""
        return next((index for index, operand in enumerate(self.inputs) if operand.role is role), None)

    def operand(self, node: ir.Node, role: Role) -> ir.Value | None:
        """The input of a node of this op that has that role; None where the op has none, or the node leaves it out."""
        index = self.index(role)
        return node.inputs[index] if index is not None and index < len(node.inputs) else None

    @cached_property
    def is_linear(self) -> bool:
        """Whether the op multiplies activations by a weight [outputs, inputs]."""
        return self.index(Role.ACTIVATION) is not None and self.index(Role.WEIGHT) is not None

    @cached_property
    def is_float_linear(self) -> bool:
        """Whether the op is a linear with a float32 weight."""
        index = self.index(Role.WEIGHT)
        return self.is_linear and index is not None and self.inputs[index].dtypes == (ir.DataType.FLOAT,)

    @cached_property
    def accumulates(self) -> bool:
        """Whether the op's results are sums of integer products, which another op scales."""
        return any(operand.role is Role.ACCUMULATOR for operand in self.outputs)

    @cached_property
    def scales_sums(self) -> bool:
        """Whether the op scales sums of integer products that another op has computed."""
        return self.index(Role.ACCUMULATOR) is not None


def _split(given: Sequence[TensorSpec | None], node: ir.Node) -> list[TensorSpec]:
    x = given[0]
    assert x is not None
    return [TensorSpec(x.dtype, (*x.dims[:-1], width)) for width in _widths(node.inputs[1], x)]


def _widths(sizes: ir.Value | None, x: TensorSpec) -> list[int]:
    """The widths of the parts of x; raises CompileError unless they are known and make up its columns."""
    if sizes is None or sizes.const_value is None:
        raise CompileError("verify", "input sizes", found="a computed value", expected="an int64 initializer")
    widths = [int(size) for size in sizes.const_value.numpy()]
    if sizes.const_value.dtype != ir.DataType.INT64 or sum(widths) != x.dims[-1] or min(widths) <= 0:
        raise CompileError("verify", "input sizes", found=str(widths), expected=f"int64 parts that add up to {x.dims[-1]}")
    return widths


def _low_rank(given: Sequence[TensorSpec | None], node: ir.Node) -> list[TensorSpec]:
    spec = spec_of(node)
    inferred = signature.infer(spec.inputs, spec.outputs, given, {})
    sizes, y = operand(node, Role.SIZES), given[0]
    assert y is not None
    count, names = 1 if sizes is None else len(_widths(sizes, y)), attributes_of(node)["targets"].split(",")
    if len(names) != count or not any(names):
        raise CompileError("verify", "attribute targets", found=",".join(names), expected=f"{count} names of linears")
    return inferred


def columns_of_targets(node: ir.Node) -> dict[str, slice]:
    """The columns of each linear that an op of adapters changes, by name."""
    sizes, y = operand(node, Role.SIZES), node.inputs[0]
    assert y is not None and y.shape is not None
    width, counts = y.shape[1], None if sizes is None or sizes.const_value is None else sizes.const_value.numpy()
    assert isinstance(width, int), "only rows are symbolic"
    return meanings.target_columns(attributes_of(node)["targets"], counts, width)


def _check_block(size: int, x: TensorSpec | None) -> None:
    """Raise CompileError unless blocks are whole registers of 16 floats, and rows are whole blocks."""
    assert x is not None
    width = x.dims[-1]
    if size < 16 or size & (size - 1) or not isinstance(width, int) or width % size:
        expected = f"a power of two from 16 on that divides the width {width}"
        raise CompileError("verify", "block of the Hadamard transform", found=str(size), expected=expected)


def _group_linear(given: Sequence[TensorSpec | None], node: ir.Node) -> list[TensorSpec]:
    spec, group = spec_of(node), attributes_of(node)["group"]
    if group < 1:
        raise CompileError("verify", "attribute group", found=str(group), expected="1 input or more")
    inferred = signature.infer(spec.inputs, spec.outputs, given, {})
    wq, ws, bits = given[2], given[3], attributes_of(node)["integer_bits"]
    assert wq is not None and ws is not None
    if (wq.dtype == ir.DataType.INT4) != (bits == 4):
        expected = f"{'int4' if bits == 4 else 'int8'}, as attribute integer_bits is {bits}"
        raise CompileError("verify", "input wq", found=str(wq), expected=expected)
    inputs = wq.dims[1]
    groups = -(-inputs // group) if isinstance(inputs, int) else None
    if ws.dims[1] != groups:
        expected = f"float16[N, {groups}]: a scale for every {group} of {inputs} inputs"
        raise CompileError("verify", "input ws", found=str(ws), expected=expected)
    return inferred


def _head_norm(given: Sequence[TensorSpec | None], node: ir.Node) -> list[TensorSpec]:
    spec = spec_of(node)
    inferred = signature.infer(spec.inputs, spec.outputs, given, {})
    x, scale = given
    assert x is not None and scale is not None
    width, head_dim = x.dims[-1], scale.dims[0]
    if not isinstance(width, int) or not isinstance(head_dim, int) or width % head_dim:
        raise CompileError("verify", "input scale", found=str(scale), expected=f"heads that divide the width {width}")
    return inferred


def _identity(given: Sequence[TensorSpec | None], node: ir.Node) -> list[TensorSpec]:
    assert given[0] is not None
    return [given[0]]


_INTEGERS = "xq:int8/int16[T,K] xs@token_scale:float32[T]"  # outputs of ops that quantize activations
_LAST_AXIS = {
    "axis": Attribute(int, -1, allowed=(-1,)),
    "epsilon": Attribute(float, 1e-5),
    "stash_type": Attribute(int, 1, allowed=(1,)),
}
_NORM = {"kind": Attribute(str, allowed=("rms", "layer")), "epsilon": Attribute(float)}
_BITS = {"bits": Attribute(int, 8, allowed=signature.ACTIVATION_BITS)}
_ROTATED_BITS = _BITS | {"hadamard": Attribute(int, 0)}  # block of the BlockHadamard before the quantization; 0: none
_GEMM = {
    "alpha": Attribute(float, 1.0, allowed=(1.0,)),
    "beta": Attribute(float, 1.0, allowed=(1.0,)),
    "transA": Attribute(int, 0, allowed=(0,)),
    "transB": Attribute(int, 0, allowed=(1,)),
}
_ROTARY = {
    "attention_scaling": Attribute(float, 1.0),
    "dynamic_factor": Attribute(float, 0.0),
    "original_max": Attribute(int, 0),
    "base": Attribute(float, 0.0),
}
_ATTENTION = {
    "layer": Attribute(int),
    "num_heads": Attribute(int),
    "num_kv_heads": Attribute(int),
    "head_dim": Attribute(int),
    "scale": Attribute(float),
    "window": Attribute(int, 0),  # tokens that a token attends to, itself among them; 0: all
}
# The names of the linears with commas between them (see `meanings.target_columns`), and the largest rank of an adapter
_LOW_RANK = {"targets": Attribute(str), "rank": Attribute(int)}

SPECS: tuple[OpSpec, ...] = (
    # ONNX ops that frontends emit. RMSNormalization is in ONNX from opset 23 on and has no bias.
    OpSpec("", "Identity", "x:float32[T,K]", "y:float32[T,K]", meanings.identity, rule=_identity),
    OpSpec("", "Gather", "x@table:float32[N,K] indices@index:int32[R]", "y:float32[R,K]", meanings.gather,
           {"axis": Attribute(int, 0, allowed=(0,))}),
    OpSpec("", "Split", "x:float32[T,K] sizes:int64[P]", "", meanings.split,
           {"axis": Attribute(int, 0, allowed=(-1,))}, rule=_split, variadic=True),
    OpSpec("", "Add", "x:float32[T,K] r:float32[T,K]", "sum:float32[T,K]", meanings.add),
    OpSpec("", "LayerNormalization", "x:float32[T,K] scale@gain:float32[K] bias?:float32[K]", "normed:float32[T,K]",
           meanings.layer_norm, _LAST_AXIS),
    OpSpec("", "RMSNormalization", "x:float32[T,K] scale@gain:float32[K]", "normed:float32[T,K]", meanings.rms_norm,
           _LAST_AXIS),
    OpSpec("", "Gemm", "x:float32[T,K] weight:float32[N,K] bias?:float32[N]", "y:float32[T,N]", meanings.linear, _GEMM),
    OpSpec("", "Gelu", "x:float32[T,K]", "y:float32[T,K]", meanings.gelu,
           {"approximate": Attribute(str, "none", allowed=("tanh",))}),
    # Ops that ONNX lacks.
    OpSpec(BELLE, "HeadNorm", "x:float32[T,K] scale@gain:float32[D]", "normed:float32[T,K]", meanings.head_norm,
           {"epsilon": Attribute(float)}, rule=_head_norm),
    OpSpec(BELLE, "SwiGLU", "gate:float32[T,F] up:float32[T,F]", "y:float32[T,F]", meanings.swiglu),
    OpSpec(BELLE, "BlockHadamard", "x:float32[T,K]", "y:float32[T,K]", meanings.block_hadamard, {"block": Attribute(int)}),
    OpSpec(BELLE, "RotaryTable", "positions@index:int32[T] sequences@index:int32[T] inv_freq@frequency:float32[H]",
           "cos_sin@rotary:float32[T,2*H]", meanings.rotary_table, _ROTARY),
    OpSpec(BELLE, "Attention",
           "q@query:float32[T,num_heads*head_dim] k@key:float32[T,num_kv_heads*head_dim] "
           "v@value:float32[T,num_kv_heads*head_dim] positions@index:int32[T] sequences@index:int32[T] "
           "block_table@state:int32[B,MB] cos_sin?@rotary:float32[T,head_dim] slopes?@slope:float32[num_heads]",
           "y:float32[T,num_heads*head_dim]", meanings.attention, _ATTENTION, stateful=True),
    # INT8 weights have a scale per output channel. Activations of 8 or 16 bits have a scale per token, computed at run time, or
    # one `step` for all tokens.
    OpSpec(BELLE, "QuantizeTokens", "x:float32[T,K] step?:float32[1]", _INTEGERS, meanings.quantize_tokens, _BITS),
    OpSpec(BELLE, "IntegerLinear", "xq:int8/int16[T,K] wq@weight:int8[N,K]", "acc@accumulator:int32/int64[T,N]",
           meanings.integer_linear),
    OpSpec(BELLE, "Dequantize",
           "acc@accumulator:int32/int64[T,N] xs@token_scale:float32[T] ws@scale:float32[N] bias?:float32[N]",
           "y:float32[T,N]", meanings.dequantize),
    OpSpec(BELLE, "QuantizedEmbedding",
           "token_ids@index:int32[T] wq@table:int8[V,K] ws@scale:float32[V] first?:int32[1]",
           "y:float32[T,K]", meanings.quantized_embedding),
    # INT4 weights have a scale, and perhaps a zero point, per output and `group` of inputs. The product is summed group by
    # group: there is no single integer product to scale. Weights of 6 `integer_bits` are INT8 from -32 to 31.
    OpSpec(BELLE, "GroupQuantizedLinear",
           "xq:int8[T,K] xs@token_scale:float32[T] wq@weight:int4/int8[N,K] ws@group_scale:float16[N,G] bias?:float32[N] "
           "zero_point?:int8[N,G]",
           "y:float32[T,N]", meanings.group_linear, {"group": Attribute(int, GROUP), "integer_bits": Attribute(int, 4, (4, 6))},
           rule=_group_linear),
    # Changes of low rank by the adapters of a step's sequences, added to the results y of the linears `targets` in place.
    OpSpec(BELLE, "LowRank", "y:float32[T,N] x:float32[T,K] sequences@index:int32[T] sizes?:int64[P]", "sum:float32[T,N]",
           meanings.low_rank, _LOW_RANK, adapted=True, rule=_low_rank),
    OpSpec(BELLE, "QuantizedLowRank",
           "y:float32[T,N] xq:int8/int16[T,K] xs@token_scale:float32[T] sequences@index:int32[T] sizes?:int64[P]",
           "sum:float32[T,N]", meanings.quantized_low_rank, _LOW_RANK, adapted=True, rule=_low_rank),
    # Ops of one of several ranks. An embedding with `first` has the tokens from that one on, and returns zeros for others.
    OpSpec(BELLE, "Embedding", "token_ids@index:int32[T] table:float32[V,K] first:int32[1]", "y:float32[T,K]",
           meanings.embedding),
    OpSpec(BELLE, "AllReduce", "x:float32[T,K]", "sum:float32[T,K]", meanings.all_reduce, collective=True),
    # Fusions of the ops above.
    OpSpec(BELLE, "QuantizedLinear",
           "xq:int8/int16[T,K] xs@token_scale:float32[T] wq@weight:int8[N,K] ws@scale:float32[N] bias?:float32[N]",
           "y:float32[T,N]", meanings.quantized_linear),
    OpSpec(BELLE, "AddNorm", "x:float32[T,K] r:float32[T,K] scale@gain:float32[K] bias?:float32[K]",
           "sum:float32[T,K] normed:float32[T,K]", meanings.add_norm, _NORM),
    OpSpec(BELLE, "NormQuantize", "x:float32[T,K] scale@gain:float32[K] bias?:float32[K] step?:float32[1]",
           _INTEGERS, meanings.norm_quantize, _NORM | _BITS),
    OpSpec(BELLE, "AddNormQuantize",
           "x:float32[T,K] r:float32[T,K] scale@gain:float32[K] bias?:float32[K] step?:float32[1]",
           f"sum:float32[T,K] {_INTEGERS}", meanings.add_norm_quantize, _NORM | _BITS),
    OpSpec(BELLE, "GeluQuantize", "x:float32[T,K] step?:float32[1]", _INTEGERS, meanings.gelu_quantize, _ROTATED_BITS),
    OpSpec(BELLE, "SwiGLUQuantize", "gate:float32[T,K] up:float32[T,K] step?:float32[1]", _INTEGERS,
           meanings.swiglu_quantize, _ROTATED_BITS),
)  # fmt: skip

REGISTRY: Mapping[str, OpSpec] = {spec.name: spec for spec in SPECS}


def spec_of(node: ir.Node) -> OpSpec:
    """The spec of a node's op; raises CompileError for an op that is not registered."""
    spec = REGISTRY.get(node.op_type)
    if spec is None or spec.domain != node.domain:
        what = f"op {node.domain or 'ai.onnx'}::{node.op_type}"
        raise CompileError("verify", what, node=str(node.name), expected="an op of compiler/ir/ops.py")
    return spec


def operand(node: ir.Node, role: Role) -> ir.Value | None:
    """The input of a node that has that role; None where its op has none, or the node leaves it out."""
    return spec_of(node).operand(node, role)


def is_float_linear(node: ir.Node) -> bool:
    """Whether a node multiplies float32 activations by a float32 weight."""
    return spec_of(node).is_float_linear


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """All attributes of a node as Python values, including defaults; raises CompileError where they do not fit."""
    spec, name = spec_of(node), str(node.name)
    unknown = node.attributes.keys() - spec.attributes.keys()
    if unknown:
        raise CompileError(
            "verify", f"attributes of {spec.name}", node=name, found=", ".join(sorted(unknown)),
            expected=", ".join(spec.attributes) or "none",
        )  # fmt: skip
    values: dict[str, Any] = {}
    for key, attribute in spec.attributes.items():
        value = node.attributes[key].value if key in node.attributes else attribute.default
        expected = " or ".join(repr(choice) for choice in attribute.allowed) or f"a value of type {attribute.type.__name__}"
        if type(value) is not attribute.type or (attribute.allowed and value not in attribute.allowed):
            raise CompileError("verify", f"attribute {key} of {spec.name}", node=name, found=repr(value), expected=expected)
        values[key] = value
    return values


def infer_outputs(node: ir.Node) -> list[TensorSpec]:
    """The specs of a node's outputs by the shape rule of its op; raises a CompileError that names the node."""
    spec = spec_of(node)
    attributes = attributes_of(node)
    if len(node.inputs) > len(spec.inputs):
        raise CompileError(
            "verify", f"inputs of {spec.name}", node=str(node.name), found=str(len(node.inputs)), expected=str(len(spec.inputs))
        )
    given = [None if value is None else TensorSpec.of(value) for value in node.inputs]
    given += [None] * (len(spec.inputs) - len(given))
    try:
        if spec.rule is not None:
            for declared, tensor in zip(spec.inputs, given, strict=True):
                if tensor is None and not declared.optional:
                    raise CompileError("verify", f"input {declared.name}", found="nothing", expected="a value")
            return spec.rule(given, node)
        bias = spec.operand(node, Role.BIAS)
        if attributes.get("kind") == "rms" and bias is not None:
            raise CompileError("verify", "input bias", found=str(TensorSpec.of(bias)), expected="none with kind='rms'")
        outputs = signature.infer(spec.inputs, spec.outputs, given, attributes)
        block = attributes.get("block", attributes.get("hadamard") or None)
        if block is not None:
            _check_block(block, given[0])
        return outputs
    except CompileError as error:
        raise CompileError(
            "verify", f"{spec.name}: {error.what}", node=str(node.name), found=error.found, expected=error.expected
        ) from None
