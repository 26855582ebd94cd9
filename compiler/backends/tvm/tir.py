"""A thin layer over TVM's TIR builder: functions of pointers, vectors of 16 lanes, and intrinsics that kernels share.

Every vector is written 16 lanes wide; LLVM splits it in two where the instruction set has 256-bit registers. All
indices are int64: a 250,880 x 4096 table times four bytes does not fit in 31 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as builder_ir

LANES = 16
F16 = "float32x16"
I16 = "int32x16"
Expr = Any  # TIR expressions have no useful static type
Buffer = Any
T: Any = builder_ir  # TVM's names for statements and expressions


def prim_func(name: str, pointers: Sequence[tuple[str, str]], body: Callable[..., None]) -> tvm.tirx.PrimFunc:
    """An exported function of pointers; `body` is called with one flat buffer for each (name, dtype)."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            handles = [T.arg(pointer, T.ptr(dtype)) for pointer, dtype in pointers]
            body(*[T.decl_buffer((1 << 40,), dtype, data=h) for h, (_, dtype) in zip(handles, pointers, strict=True)])
    return builder.get()


def with_lanes(dtype: str, lanes: int) -> str:
    """The dtype of a vector; one lane is a scalar."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def float_type(lanes: int) -> str:
    return with_lanes("float32", lanes)


def int_type(lanes: int) -> str:
    return with_lanes("int32", lanes)


def i64(value: Expr) -> Expr:
    """An int64 constant or cast."""
    return T.int64(value) if isinstance(value, int) else T.cast(value, "int64")


def bind(value: Expr) -> Expr:
    """Evaluate an expression once, at this point of the program.

    Indices pass through a variable in memory, which LLVM removes: TVM's simplifier puts a bound index back into every use,
    and its bounds of nested min and floordiv take time exponential in the depth (attention: minutes instead of seconds).
    """
    if not hasattr(value, "ty") or str(value.ty.dtype) != "int64":  # comparisons have no type yet
        return T.bind(value)
    slot = T.alloc_buffer((1,), "int64")
    T.buffer_store(slot, value, [0])
    return T.bind(slot[0])


def view_as(buffer: Buffer, dtype: str) -> Buffer:
    """The same memory as elements of another type."""
    return T.decl_buffer((1 << 40,), dtype, data=buffer.data)


def load(buffer: Buffer, index: Expr, lanes: int = LANES) -> Expr:
    """`lanes` neighbouring elements from `index`."""
    return buffer[T.ramp(i64(index), i64(1), lanes)] if lanes > 1 else buffer[i64(index)]


def store(buffer: Buffer, index: Expr, value: Expr, lanes: int = LANES) -> None:
    """Write `lanes` neighbouring elements from `index`."""
    T.buffer_store(buffer, value, [T.ramp(i64(index), i64(1), lanes) if lanes > 1 else i64(index)])


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """The same number or scalar expression in every lane; Python numbers become float32."""
    value = T.float32(value) if isinstance(value, (int, float)) else value
    return T.broadcast(value, lanes) if lanes > 1 else value


def splat_i32(value: int, lanes: int = LANES) -> Expr:
    """The same int32 constant in every lane."""
    return T.broadcast(T.int32(value), lanes) if lanes > 1 else T.int32(value)


def constants(values: Sequence[float]) -> Expr:
    """A vector with one float32 constant for each lane."""
    return T.Shuffle([T.float32(value) for value in values], [T.int32(lane) for lane in range(len(values))])


def pure(dtype: str, intrinsic: str, *args: Expr) -> Expr:
    """Call an LLVM intrinsic that has no side effects."""
    return T.call_llvm_pure_intrin(dtype, intrinsic, *args)


class Registers:
    """`count` vectors that LLVM keeps in registers: every index is a Python int."""

    def __init__(self, count: int, dtype: str = F16, initial: Expr | None = None) -> None:
        # One allocation each: TVM moves allocations of 1 KiB and more off the stack, where LLVM cannot promote them.
        self.buffers = [T.alloc_buffer((1,), dtype) for _ in range(count)]
        if initial is not None:
            for i in range(count):
                self[i] = initial

    def __getitem__(self, index: int) -> Expr:
        return self.buffers[index][0]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self.buffers[index], value, [0])


def scalar(value: Expr, dtype: str = "float32") -> Registers:
    """A mutable scalar, read and written as `x[0]`."""
    return Registers(1, dtype, T.float32(value) if isinstance(value, (int, float)) and dtype == "float32" else value)


def local(size: int, dtype: str = "float32") -> Buffer:
    """Scratch memory of one task, on its stack whatever its size (TVM would allocate 1 KiB and more as workspace), in whole
    cache lines: TVM aligns to at most 16 bytes unless the type requires more."""
    lines = -(-size * (tvm.DataType(dtype).bits // 8) // 64)
    return view_as(T.alloc_buffer((lines,), F16, annotations={"disable_lower_builtin": True}), dtype)


def opaque(value: Expr, dtype: str = "int64") -> Expr:
    """Evaluate an expression once, at this point, and hide its formula from TVM, whose simplifier takes minutes for nested min,
    floordiv and loads in the condition of an if."""
    return scalar(value, dtype)[0]


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """A block of statements that run only if `condition` holds."""
    with T.If(condition), T.Then():
        yield


def either(condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Emit `yes` for the case that `condition` holds, and `no` for the other."""
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()


def for_range(stop: Expr, body: Callable[[Expr], None], start: Expr = 0) -> None:
    """A serial loop over int64."""
    with T.serial(i64(start), i64(stop)) as index:
        body(index)


def parallel(extent: Expr, body: Callable[[Expr], None], interleave: bool = False) -> None:
    """A loop divided among the threads of the pool: into contiguous chunks, or every n-th index to each if `interleave`."""
    single = isinstance(extent, int) and extent == 1  # TVM removes such a loop, and then misses it inside the pragmas
    with ExitStack() as stack:
        for pragma in ("launch_point", "stride_pattern") if interleave and not single else ():
            stack.enter_context(T.attr(T.int32(0), f"pragma_parallel_{pragma}", T.int32(1)))
        body(stack.enter_context(T.parallel(i64(0), i64(extent))))


def for_rows(rows: Expr, body: Callable[[Expr], None]) -> None:
    """Emit `body(row)` for every row; a single row runs in the calling thread, since waking the others would take longer."""
    either(rows < i64(2), lambda: for_range(rows, body), lambda: parallel(rows, body))


def rows_of(pointer: Buffer) -> Expr:
    """The number of rows of the step, from its pointer."""
    return bind(i64(pointer[i64(0)]))


def for_width(width: int, vector: Callable[[Expr], None], tail: Callable[[Expr], None], unroll: int = 1) -> None:
    """Emit `vector(column)` for every full vector in a row of `width` elements and `tail(column)` for each element left."""
    whole = width // LANES
    bulk = whole // unroll

    def step(i: Expr) -> None:
        for u in range(unroll):
            vector((i * unroll + u) * LANES)

    if bulk:
        for_range(bulk, step)
    for v in range(bulk * unroll, whole):
        vector(i64(v * LANES))
    if width % LANES:
        for_range(width % LANES, lambda i: tail(i + whole * LANES))


def lane_numbers(first: Expr = 0, lanes: int = LANES) -> Expr:
    """The int32 vector first, first + 1, ..."""
    first = T.int32(first) if isinstance(first, int) else T.cast(first, "int32")
    return T.ramp(first, T.int32(1), lanes) if lanes > 1 else first


def sum_lanes(vector: Expr) -> Expr:
    """The sum of the 16 float32 lanes, added pairwise, always in the same order, as a scalar."""
    return bind(T.Shuffle([_folded(vector, add)], [T.int32(0)]))


def reduce_each(vectors: Sequence[Expr]) -> Expr:
    """A vector with the sum of the 16 float32 lanes of each of the vectors, whose number is a power of two; lanes are added in
    the order of `sum_lanes`."""
    vectors, width, sums = list(vectors), LANES, len(vectors)
    while width > 1:
        half, pairs = width // 2, []
        # Each vector holds the partial sums of one or several of the given ones, `width` lanes each. Where there are two
        # vectors, their halves are added in one vector.
        for group in zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0],)]:
            lanes = width * sums // len(vectors) * len(group)
            low = [start + i for start in range(0, lanes, width) for i in range(half)]
            first, second = (bind(T.Shuffle(list(group), [T.int32(at + shift) for at in low])) for shift in (0, half))
            pairs.append(bind(first + second))
        vectors, width = pairs, half
    return vectors[0]


def pairwise(values: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine values with their neighbours, then the results with theirs, until one is left."""
    values = list(values)
    while len(values) > 1:
        odd = values[len(values) // 2 * 2 :]
        values = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + odd
    return values[0]


def highest_lane(vector: Expr) -> Expr:
    """A vector whose 16 lanes all have the largest lane of `vector`."""
    return _folded(vector, T.max)


def _folded(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """A vector whose 16 lanes all have the lanes of `vector` combined: each with that 8 further, then 4, 2 and 1."""
    for step in (8, 4, 2, 1):
        vector = bind(vector)
        turned = T.Shuffle([vector, vector], [T.int32(lane ^ step) for lane in range(LANES)])
        vector = combine(vector, turned)
    return bind(vector)


def transpose(vectors: Sequence[Expr]) -> list[Expr]:
    """The 16 columns of 16 vectors, in four rounds of swaps between pairs of them."""
    vectors = list(vectors)
    for half in (8, 4, 2, 1):
        low = [lane if lane & half == 0 else LANES + lane - half for lane in range(LANES)]
        high = [lane + half if lane & half == 0 else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if i & half == 0):
            pair = [vectors[i], vectors[i + half]]
            vectors[i], vectors[i + half] = (bind(T.Shuffle(pair, [T.int32(lane) for lane in lanes])) for lanes in (low, high))
    return vectors


def add(a: Expr, b: Expr) -> Expr:
    return a + b


def prefetch(buffer: Buffer, index: Expr, level: int = 1) -> None:
    """Prefetch a cache line into the cache of `level`, 1 or 2; 0 is for data that is read only once."""
    address, locality = T.address_of(buffer[i64(index)]), T.int32({0: 0, 1: 3, 2: 2}[level])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, T.int32(0), locality, T.int32(1)))


def fma(a: Expr, b: Expr, c: Expr, lanes: int = LANES) -> Expr:
    """a * b + c, rounded once. In a sum of two products, LLVM could fuse either of them; this fixes which one."""
    return pure(float_type(lanes), "llvm.fma", a, b, c)


def rint(value: Expr, lanes: int = LANES) -> Expr:
    """Round to the nearest integer, halves to even."""
    return pure(float_type(lanes), "llvm.rint", value)


def to_int8(value: Expr, lanes: int = LANES) -> Expr:
    """Round to the nearest int8, halves to even; values must lie within +-127."""
    return T.cast(T.cast(rint(value, lanes), int_type(lanes)), with_lanes("int8", lanes))


def exp(x: Expr, lanes: int = LANES) -> Expr:
    """e**x to 2 units in the last place for -87.3 <= x <= 88, clamped beyond (Cephes' polynomial; LLVM has no vector exp).

    x = n*ln2 + r with |r| <= ln2/2; ln2 is taken in two parts so that r is exact.
    """

    def constant(value: float) -> Expr:
        return splat(value, lanes)

    dtype = float_type(lanes)
    x = opaque(T.max(T.min(x, constant(88.0)), constant(-87.33654)), dtype)
    n = opaque(rint(x * constant(1.4426950408889634), lanes), dtype)
    r = opaque(x - n * constant(0.693359375) - n * constant(-2.12194440e-4), dtype)
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + constant(coefficient)
    p = p * (r * r) + r + constant(1.0)
    power = T.shift_left(T.cast(n, int_type(lanes)) + splat_i32(127, lanes), splat_i32(23, lanes))
    return p * T.reinterpret(float_type(lanes), power)


def exp2(x: Expr) -> Expr:
    """2**x for 16 lanes of x <= 0 with a relative error of 3e-6; exact for x = 0, and 0 for x far below. That is enough for
    attention weights that are rounded to bfloat16 next. Needs AVX-512."""
    n = opaque(rint(x), F16)
    r = opaque(x - n, F16)
    p = splat(9.5828525e-3)
    for coefficient in (5.5906426e-2, 2.4024099e-1, 6.9312419e-1, 1.0):
        p = fma(p, r, splat(coefficient))
    return pure(F16, "llvm.x86.avx512.mask.scalef.ps.512", p, n, splat(0.0), T.uint16(0xFFFF), T.int32(4))


def bfloat16_bits(value: Expr, lanes: int = LANES) -> Expr:
    """The bfloat16 nearest to a float32 (halves to even; NaN stays NaN) in the low half of an int32."""
    bits = bind(T.reinterpret(int_type(lanes), value))
    odd = T.bitwise_and(T.shift_right(bits, splat_i32(16, lanes)), splat_i32(1, lanes))
    rounded = T.shift_right(bits + splat_i32(0x7FFF, lanes) + odd, splat_i32(16, lanes))
    nan = T.bitwise_or(T.shift_right(bits, splat_i32(16, lanes)), splat_i32(0x40, lanes))
    # TVM folds value == value to true, so NaN is recognized by its bits.
    number = T.bitwise_and(bits, splat_i32(0x7FFFFFFF, lanes)) <= splat_i32(0x7F800000, lanes)
    return bind(T.bitwise_and(T.Select(number, rounded, nan), splat_i32(0xFFFF, lanes)))


def bfloat16_pair(low: Expr, high: Expr, lanes: int = LANES) -> Expr:
    """Two bfloat16 in each int32, the first in its low half."""
    return T.bitwise_or(bfloat16_bits(low, lanes), T.shift_left(bfloat16_bits(high, lanes), splat_i32(16, lanes)))


def of_pair(pair: Expr, lanes: int = LANES) -> tuple[Expr, Expr]:
    """The two bfloat16 of a pair as float32."""
    low = T.shift_left(pair, splat_i32(16, lanes))
    high = T.bitwise_and(pair, splat_i32(-65536, lanes))
    return tuple(bind(T.reinterpret(float_type(lanes), half)) for half in (low, high))
