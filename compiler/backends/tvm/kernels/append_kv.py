"""Write the keys and values of a step to the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.cache_blocks import BLOCK, CacheBlocks, as_pairs, as_scales
from belle_compile.compiler.backends.tvm.kernels.rotary import rotate_head
from belle_compile.compiler.backends.tvm.kernels.rowwise import Values, absolute, each, inverse_scale, row_absmax
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T

SERIAL_BELOW = 2048  # fewer elements of k are written faster by one thread than by waking others


@dataclass(frozen=True)
class AppendKV(Kernel, kernels.AppendKV):
    """Keys are stored [block][kv head][head_dim][16], values [block][kv head][16][head_dim].

    Keys are stored transposed, so that attention multiplies one element of q with 16 tokens at a time. In a bfloat16 cache
    two elements of a key, and two tokens' values, lie side by side. Where a step holds all tokens of a block, as when a prompt
    is read, its keys are transposed in registers.
    """

    @property
    def cache(self) -> CacheBlocks:
        return CacheBlocks.of(self)

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        rows = tir.rows_of(named["rows"])

        def task(index: Expr) -> None:
            """Emit the task of one head; heads are outermost, so that a thread writes whole cache lines that it will read
            itself."""
            self._append(tir.bind(T.floormod(index, rows)), tir.bind(T.floordiv(index, rows)), named)

        tasks = tir.bind(rows * self.num_kv_heads)
        serial = tasks * self.head_dim < tir.i64(SERIAL_BELOW)
        tir.either(serial, lambda: tir.for_range(tasks, task), lambda: tir.parallel(tasks, task))

    def _append(self, row: Expr, head: Expr, named: dict[str, Buffer]) -> None:
        position = tir.bind(tir.i64(named["positions"][row]))
        entry = tir.i64(named["sequences"][row]) * self.max_blocks + T.floordiv(position, BLOCK)
        block = self.cache.start(named["block_table"][entry], head)
        slot = tir.bind(T.floormod(position, BLOCK))
        whole = self._whole_block(row, position, slot, named)

        def first_of_block() -> None:
            with tir.when(slot == 0):
                self._append_keys(row, head, block, named)
                if self.cache.paired:
                    self._append_value_pairs(row, head, block, named)

        def one_token() -> None:
            self._append_key(row, head, block, slot, named)
            if self.cache.paired:
                self._append_half_pairs(row, head, block, slot, named)

        tir.either(whole == 0, one_token, first_of_block)
        if not self.cache.paired:
            self._append_value(row, head, block, slot, named)

    def _whole_block(self, row: Expr, position: Expr, slot: Expr, named: dict[str, Buffer]) -> Expr:
        """1 if the step has all 16 tokens of a row's block, in the 16 rows that start `slot` rows before it; else 0."""
        first, answer = tir.opaque(row - slot), tir.scalar(tir.i64(0), "int64")
        with tir.when(first >= 0), tir.when(first + BLOCK <= tir.rows_of(named["rows"])):
            sequences = T.bitwise_xor(tir.load(named["sequences"], first), tir.splat(named["sequences"][row]))
            positions = T.bitwise_xor(tir.load(named["positions"], first), tir.lane_numbers(position - slot))
            differences = T.bitwise_or(sequences, positions)
            answer[0] = tir.i64(tir.pure("int32", "llvm.vector.reduce.or", differences) == 0)
        return answer[0]

    def _rotate(self, row: Expr, head: Expr, target: Buffer, start: Expr, named: dict[str, Buffer]) -> None:
        source = tir.bind(self.k.row(row) + head * self.head_dim)
        rotate_head(self.head_dim, lambda c, lanes: tir.load(named["k"], source + c, lanes), named.get("cos_sin"), row,
                    lambda c, lanes, value: tir.store(target, start + c, value, lanes))  # fmt: skip

    def _append_keys(self, row: Expr, head: Expr, block: Expr, named: dict[str, Buffer]) -> None:
        """Write the keys of the 16 rows from `row`, which fill a block."""
        dim, padded = self.head_dim, round_up(self.head_dim, tir.LANES)
        rotated, columns = tir.local(BLOCK * padded), tir.local(padded * BLOCK)
        tir.for_range(tir.i64(BLOCK), lambda i: self._rotate(row + i, head, rotated, tir.bind(i * padded), named))

        def turn(v: Expr) -> None:
            tokens = [tir.bind(tir.load(rotated, v * tir.LANES + i * padded)) for i in range(BLOCK)]
            for d, column in enumerate(tir.transpose(tokens)):
                tir.store(columns, (v * tir.LANES + d) * BLOCK, column)

        tir.for_range(padded // tir.LANES, turn)
        inverse = None
        if self.cache.quantized:
            highest = tir.Registers(1, tir.F16, tir.splat(0.0))
            tir.for_range(dim, lambda d: highest.__setitem__(0, T.max(highest[0], absolute(tir.load(columns, d * BLOCK)))))
            absmax = tir.bind(highest[0])
            inverse = inverse_scale(absmax, tir.LANES)
            tir.store(as_scales(named["kcache"]), self.cache.scales_before(block), absmax / tir.splat(127.0))

        def write_pair(d: Expr) -> None:
            low, high = (tir.load(columns, (d * 2 + i) * BLOCK) for i in range(2))
            tir.store(as_pairs(named["kcache"]), self._pairs(block) + d * BLOCK, tir.bfloat16_pair(low, high))

        def write(d: Expr) -> None:
            keys = tir.load(columns, d * BLOCK)
            cast = T.cast(keys, tir.with_lanes(self.cache_dtype, BLOCK)) if inverse is None else tir.to_int8(keys * inverse)
            tir.store(named["kcache"], block + d * BLOCK, cast)

        if self.cache.paired:
            tir.for_range(dim // 2, write_pair)
        else:
            tir.for_range(dim, write)

    def _append_key(self, row: Expr, head: Expr, block: Expr, slot: Expr, named: dict[str, Buffer]) -> None:
        dim, rotated = self.head_dim, tir.local(self.head_dim)
        self._rotate(row, head, rotated, tir.i64(0), named)
        if self.cache.paired:
            pairs, start = as_pairs(named["kcache"]), tir.bind(self._pairs(block) + slot)

            def pair(d: Expr) -> None:
                both = tir.bfloat16_pair(rotated[d * 2], rotated[d * 2 + 1], 1)
                tir.store(pairs, start + d * BLOCK, both, 1)

            tir.for_range(dim // 2, pair)
            return
        stored = self._stored(lambda c, lanes: tir.load(rotated, c, lanes), named["kcache"], block, slot)
        line = tir.local(dim, self.cache_dtype)
        each(dim, lambda c, lanes: tir.store(line, c, stored(c, lanes), lanes))
        tir.for_range(dim, lambda d: tir.store(named["kcache"], block + d * BLOCK + slot, line[d], 1))

    def _append_value(self, row: Expr, head: Expr, block: Expr, slot: Expr, named: dict[str, Buffer]) -> None:
        dim = self.head_dim
        source, target = tir.bind(self.v.row(row) + head * dim), tir.bind(block + slot * dim)
        stored = self._stored(lambda c, lanes: tir.load(named["v"], source + c, lanes), named["vcache"], block, slot)
        each(dim, lambda c, lanes: tir.store(named["vcache"], target + c, stored(c, lanes), lanes))

    def _append_value_pairs(self, row: Expr, head: Expr, block: Expr, named: dict[str, Buffer]) -> None:
        """Write the values of the 16 rows from `row`, which fill a block."""
        source, pairs = tir.bind(self.v.row(row) + head * self.head_dim), as_pairs(named["vcache"])

        def two_tokens(i: Expr) -> None:
            start, target = tir.bind(source + i * (2 * self.v.stride)), tir.bind(self._pairs(block) + i * self.head_dim)

            def pair(c: Expr, lanes: int) -> None:
                low, high = (tir.load(named["v"], start + token * self.v.stride + c, lanes) for token in range(2))
                tir.store(pairs, target + c, tir.bfloat16_pair(low, high, lanes), lanes)

            each(self.head_dim, pair)

        tir.for_range(BLOCK // 2, two_tokens)

    def _append_half_pairs(self, row: Expr, head: Expr, block: Expr, slot: Expr, named: dict[str, Buffer]) -> None:
        """Write the values of one token as 16-bit halves of pairs; another thread may be writing the neighbour's halves."""
        source = tir.bind(self.v.row(row) + head * self.head_dim)
        target = tir.bind(block + T.floordiv(slot, 2) * (2 * self.head_dim) + T.floormod(slot, 2))
        line = tir.local(self.head_dim, "int32")
        each(self.head_dim, lambda c, lanes: tir.store(
            line, c, tir.bfloat16_bits(tir.load(named["v"], source + c, lanes), lanes), lanes))  # fmt: skip
        tir.for_range(self.head_dim, lambda d: tir.store(named["vcache"], target + d * 2, T.cast(line[d], "uint16"), 1))

    def _pairs(self, block: Expr) -> Expr:
        """The index at which a head of a block begins, counted in pairs."""
        return T.shift_right(block, tir.i64(1))

    def _stored(self, values: Values, cache: Buffer, block: Expr, slot: Expr) -> Values:
        """The values of one head of one token as the cache holds them; also writes their scale if the cache has scales."""
        if not self.cache.quantized:
            return lambda c, lanes: T.cast(values(c, lanes), tir.with_lanes(self.cache_dtype, lanes))
        absmax = row_absmax(self.head_dim, values)
        inverse = inverse_scale(absmax)
        tir.store(as_scales(cache), self.cache.scales_before(block) + slot, absmax / T.float32(127.0), 1)
        return lambda c, lanes: tir.to_int8(values(c, lanes) * tir.splat(inverse, lanes), lanes)
