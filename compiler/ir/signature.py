"""Operand signatures such as "xq:int8/int16[T,K] wq@weight:int8[N,K] bias?:float32[N]": an op's inputs and outputs, as data.

A signature states each operand's name, role, element type and dimensions, and is the shape rule of most ops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError

Dim = int | str
_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
}
ACTIVATION_BITS = (8, 16)
_OPERAND = re.compile(r"(?P<name>\w+)(?P<optional>\?)?(?:@(?P<role>\w+))?:(?P<dtypes>\w+(?:/\w+)*)\[(?P<dims>[^\]]*)\]")


class Role(Enum):
    """The role of an operand in its op. Each role occurs at most once among an op's inputs, except for ACTIVATION and INDEX."""

    ACTIVATION = "activation"  # a row for every token
    TOKEN_SCALE = "token_scale"  # scale of an activation's integers: one number per token
    STEP = "step"  # scale of an activation's integers: one number for all tokens, known at compile time
    ACCUMULATOR = "accumulator"  # sums of integer products that have not been scaled
    WEIGHT = "weight"  # matrix of a linear: outputs along axis 0, inputs along axis 1
    SCALE = "scale"  # scale of a weight's or a table's integers: one number per row
    GROUP_SCALE = "group_scale"  # scale of a weight's integers: one number per row and group of inputs
    ZERO_POINT = "zero_point"  # the integer that stands for 0: one per row and group of inputs
    BIAS = "bias"  # added to each output of a linear, or to each channel of a norm
    GAIN = "gain"  # factor of each channel of a norm
    TABLE = "table"  # rows that an index selects
    FIRST = "first"  # the token whose embedding is the first row of a rank's part of the table
    INDEX = "index"  # numbers of tokens, positions, sequences or rows
    SIZES = "sizes"  # widths of the parts that a value is split into
    # Operands of attention
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    STATE = "state"  # where the state lies that one step leaves for the next: the block table of the KV cache
    FREQUENCY = "frequency"  # frequencies of the rotary embedding: one number for two channels of a head
    ROTARY = "rotary"  # cosines and sines of the rotary embedding, a row for every token
    SLOPE = "slope"  # slopes of ALiBi: one number per head


# Roles of a linear's constants, all of which have outputs along axis 0; and those that also have groups of inputs along axis 1.
OF_OUTPUTS = frozenset({Role.WEIGHT, Role.SCALE, Role.GROUP_SCALE, Role.ZERO_POINT, Role.BIAS})
OF_GROUPS = frozenset({Role.GROUP_SCALE, Role.ZERO_POINT})


@dataclass(frozen=True)
class TensorSpec:
    """Element type and dimensions of a tensor; a symbolic dimension is its name."""

    dtype: ir.DataType
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(str(dim) for dim in self.dims)}]"

    @classmethod
    def of(cls, value: ir.Value) -> TensorSpec:
        """The spec that a value records; raises CompileError where its dtype or a dimension is unknown."""
        if value.dtype is None or value.shape is None or value.shape.has_unknown_dim():
            raise CompileError(
                "verify", f"value {value.name}", found=f"{value.dtype}{value.shape}", expected="a known dtype and shape"
            )
        return cls(value.dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape))


@dataclass(frozen=True)
class Operand:
    """One input or output of an op. A dimension is a letter, a number, an attribute's name or a product of these.

    Two element types are those for activations of 8 and of 16 bits. All operands of a node agree on one of the two: the
    attribute `bits` decides where the op has it, else the first input that has two element types.
    """

    name: str
    role: Role
    dtypes: tuple[ir.DataType, ...]
    dims: tuple[str, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{' or '.join(map(dtype_name, self.dtypes))}[{', '.join(self.dims)}]"

    def dtype(self, width: int | None) -> ir.DataType:
        """The element type for activations of that width, an index of ACTIVATION_BITS."""
        return self.dtypes[width or 0] if len(self.dtypes) > 1 else self.dtypes[0]


def dtype_name(dtype: ir.DataType) -> str:
    """NumPy's name of an element type, e.g. float32."""
    return str(dtype.numpy())


def parse(text: str) -> tuple[Operand, ...]:
    """Operands of a signature, which are separated by spaces.

    An operand is `name`, `?` where it is optional, `@role`, `:dtypes` and `[dimensions]`. The role may be left out where the
    name is that of a role, e.g. `bias`, and for activations.
    """
    operands = []
    names = {role.value for role in Role}
    for word in text.split():
        match = _OPERAND.fullmatch(word)
        assert match, f"not an operand: {word!r}"
        dims = tuple(match["dims"].split(","))
        dtypes = tuple(_DTYPES[dtype] for dtype in match["dtypes"].split("/"))
        assert len(dtypes) in (1, len(ACTIVATION_BITS)), word
        role = Role(match["role"] or (match["name"] if match["name"] in names else "activation"))
        operands.append(Operand(match["name"], role, dtypes, dims, bool(match["optional"])))
    return tuple(operands)


def infer(
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    given: Sequence[TensorSpec | None],
    attributes: Mapping[str, object],
) -> list[TensorSpec]:
    """Infer the specs of an op's outputs from those of its inputs and its attributes.

    `given` has one entry per input, None where an optional one is left out. A letter is bound to the dimension where it first
    occurs, and must meet the same dimension everywhere else. Raises CompileError where an input does not fit.
    """
    bound: dict[str, Dim] = {name: value for name, value in attributes.items() if isinstance(value, int)}
    bits = attributes.get("bits")
    width = ACTIVATION_BITS.index(bits) if isinstance(bits, int) else None
    for operand, spec in zip(inputs, given, strict=True):
        if spec is None:
            if not operand.optional:
                raise CompileError("verify", f"input {operand.name}", found="nothing", expected=str(operand))
            continue
        if width is None and len(operand.dtypes) > 1 and spec.dtype in operand.dtypes:
            width = operand.dtypes.index(spec.dtype)
        expected = operand if width is None else replace(operand, dtypes=(operand.dtype(width),))
        fits = spec.dtype in expected.dtypes and len(spec.dims) == len(operand.dims)
        fits = fits and all(_unify(pattern, dim, bound) for pattern, dim in zip(operand.dims, spec.dims, strict=True))
        if not fits:
            known = {name: bound[name] for name in _names(operand) if name in bound}
            where = " where " + ", ".join(f"{name} = {dim}" for name, dim in known.items()) if known else ""
            raise CompileError("verify", f"input {operand.name}", found=str(spec), expected=f"{expected}{where}")
    return [TensorSpec(operand.dtype(width), tuple(_evaluate(dim, bound) for dim in operand.dims)) for operand in outputs]


def _unify(pattern: str, dim: Dim, bound: dict[str, Dim]) -> bool:
    if pattern.isidentifier() and pattern not in bound:
        bound[pattern] = dim
    return _evaluate(pattern, bound) == dim


def _evaluate(pattern: str, bound: Mapping[str, Dim]) -> Dim:
    factors: list[Dim] = [int(factor) if factor.isdigit() else bound[factor] for factor in pattern.split("*")]
    product = factors[0]
    for factor in factors[1:]:
        if isinstance(product, str) or isinstance(factor, str):
            raise CompileError("verify", f"dimension {pattern}", found=f"{product} * {factor}", expected="fixed dimensions")
        product *= factor
    return product


def _names(operand: Operand) -> list[str]:
    return [factor for dim in operand.dims for factor in dim.split("*") if not factor.isdigit()]
