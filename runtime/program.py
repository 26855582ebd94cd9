"""A program: the flat list of the kernel calls of one step, over a memory plan. Backends make it, executors run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from belle_compile.runtime.schema import OPTIONAL

PROGRAM_FORMAT = 6
PROGRAM_NAME = "program.json"
WEIGHTS_NAME = "weights.safetensors"
BLOCK_SIZE = 16  # tokens of a block of the KV cache
SERVED_TOKENS = 2048  # a host must have memory for the KV cache of one sequence of this many tokens, or of its longest context
ALIGNMENT = 64  # bytes
RANK_STEP = 4  # ranks of an adapter's change that kernels compute together
FACTOR_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2}  # types of an adapter's factors
BLOCK_ROWS = 4  # rows with the same adapter that a kernel computes together
LANES, COLUMNS = 16, 64  # neighbouring inputs of a rank, and outputs, that lie side by side in an adapter's factors
INPUTS = ("token_ids", "positions", "sequences", "block_table", "logit_rows", "candidates", "adapters", "adapted", "T", "R")
KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of an element
SCALES_BYTES = 4 * BLOCK_SIZE  # of one head of a block of an int8 cache: one float32 for each token
CUBIN = ".cubin"  # ending of a GPU kernel's member in its archive, after the kernel's name


@dataclass(frozen=True)
class Arena:
    """A buffer in the arena; JSON {"arena": byte offset, "bytes": its size, "rows": "T" or "R"}.

    `bytes` are those of one of the step's rows, of which the buffer holds the most that a step can have; or those of the whole
    buffer, where `rows` is None.
    """

    offset: int
    bytes: int
    rows: Literal["T", "R"] | None = None


@dataclass(frozen=True)
class Weight:
    """A tensor of weights.safetensors; JSON {"weight": name}."""

    name: str


@dataclass(frozen=True)
class Input:
    """One of the step's input buffers, see `INPUTS`; JSON {"input": name}."""

    name: str


@dataclass(frozen=True)
class KV:
    """The key or value cache of a layer; JSON {"kv": layer, "part": "k" | "v"}."""

    layer: int
    part: Literal["k", "v"]


@dataclass(frozen=True)
class Scratch:
    """Memory outside of the arena that holds zeros between calls; JSON {"scratch": byte offset, "bytes": its size}."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class Adapter:
    """The region of a linear in the first adapter slot, see `AdapterLayout`; JSON {"adapter": name of the linear}."""

    target: str


Arg = Arena | Weight | Input | KV | Scratch | Adapter
# The steps that need a call: all of them; those with tokens that are the only ones of their sequence ("alone", as when
# decoding); those with several tokens of one sequence ("runs", as of a prompt); or those with sequences whose adapters change
# the linear of the call's region ("adapted"). The kernel itself skips other tokens.
When = Literal["always", "alone", "runs", "adapted"]


@dataclass(frozen=True)
class AllReduce:
    """Float32 rows that are replaced by their sum over all ranks: `width` elements each, `stride` from one row to the next."""

    width: int
    stride: int


@dataclass(frozen=True)
class Call:
    """One kernel call, or a sum over ranks. All arguments are pointers.

    `rows` names the count ("T" tokens or "R" logit rows) that selects one of the `variants`: (largest row count or None for
    any, kernel name), ascending; the first whose bound is not exceeded is run. `kernel` alone is the one variant for any count.
    With `all_reduce` there is no kernel, and the one argument is the buffer. `kind` and `node` are for reports; `bytes` is how
    many bytes of weights the call reads. The call may be skipped in a step without tokens that need it (`when`).
    """

    kind: str
    node: str
    rows: Literal["T", "R"]
    args: tuple[Arg, ...]
    kernel: str | None = None
    variants: tuple[tuple[int | None, str], ...] = ()
    bytes: int = 0
    all_reduce: AllReduce | None = None
    when: When = "always"

    def kernels(self) -> tuple[tuple[int | None, str], ...]:
        """The variants, or the one kernel with the bound None; nothing for a sum over ranks."""
        return () if self.all_reduce else self.variants or ((None, self.kernel or ""),)

    def kernel_for(self, rows: int) -> str:
        """The name of the kernel that runs `rows` rows."""
        return next(name for bound, name in self.kernels() if bound is None or bound >= rows)


@dataclass(frozen=True)
class Logits:
    """This rank's logits in the arena, float32 [R, count]: byte `offset`, `stride` from row to row in elements.

    They are those of the tokens from `first` up to, not including, `first + count`. A single rank has the whole vocabulary.
    """

    offset: int
    stride: int
    first: int
    count: int


@dataclass(frozen=True)
class KVLayout:
    """KV cache: [num_blocks][layers] of k[kv_heads][head_dim][16] and v[kv_heads][16][head_dim]. Without `transposed_keys`,
    keys have the layout of values.

    Blocks are outermost, so that a short sequence touches few pages, which may be huge pages.

    bfloat16 is stored in pairs, as instructions for pairs read it: k[kv_heads][head_dim / 2][16][2] and
    v[kv_heads][8][head_dim][2].

    With int8 each [head_dim][16] or [16][head_dim] follows its 16 float32 scales, one for each token, and is padded so that the
    next one starts at a multiple of 64 bytes.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    transposed_keys: bool = True

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales before the values of one head of a block; 0 where the cache has no scales."""
        return SCALES_BYTES if self.dtype == "int8" else 0

    @property
    def head_block_bytes(self) -> int:
        """Bytes of one head of one block of one part (k or v), scales included."""
        values = self.head_dim * BLOCK_SIZE * KV_DTYPES[self.dtype]
        return self.scales_bytes + -(-values // ALIGNMENT) * ALIGNMENT if self.scales_bytes else values

    @property
    def part_block_bytes(self) -> int:
        """Bytes of one block of one part (k or v) of one layer."""
        return self.kv_heads * self.head_block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.layers * self.part_block_bytes

    def part_offset(self, part: KV) -> int:
        """The byte of a block at which the keys or values of a layer begin."""
        return (2 * part.layer + (part.part == "v")) * self.part_block_bytes


@dataclass(frozen=True)
class AdapterRegion:
    """What a slot holds of an adapter's change of a linear with these `inputs` and `outputs`, from byte `offset`.

    The first float32 is the number of groups of `RANK_STEP` ranks that the change has, 0 for none. There follow, each at the
    byte that `RegionParts` says, float32 `scale` and `addend` [rank], and the factors of the type `dtype`: a,
    [groups][inputs / LANES][RANK_STEP][LANES], and b, [outputs / COLUMNS][ranks of the groups][COLUMNS]. So kernels read each
    in one stream. Everything is padded with zeros: ranks, inputs and outputs. The change is b @ (scale * (a @ x) + addend), in
    which scales are powers of two, so that a and b use the range of their type.
    """

    offset: int
    inputs: int
    outputs: int
    dtype: str


@dataclass(frozen=True)
class AdapterLayout:
    """The slots of adapters: `slot_bytes` each, with the regions of the linears that adapters may change, by name. A change has
    at most `rank` ranks."""

    rank: int
    slot_bytes: int
    regions: dict[str, AdapterRegion]

    @classmethod
    def of(cls, rank: int, sizes: Mapping[str, tuple[int, int, str]]) -> AdapterLayout:
        """The layout for linears of these (inputs, outputs, dtype)."""
        regions, end = {}, 0
        for name, (inputs, outputs, dtype) in sizes.items():
            regions[name] = AdapterRegion(end, inputs, outputs, dtype)
            end += RegionParts.of(rank, inputs, outputs, dtype).end
        return cls(rank, end, regions)


class RegionParts(NamedTuple):
    """The parts of an `AdapterRegion`, as bytes from its start, and its size."""

    scale: int
    addend: int
    a: int
    b: int
    end: int

    @classmethod
    def of(cls, rank: int, inputs: int, outputs: int, dtype: str) -> RegionParts:
        """The parts for changes of up to `rank`."""
        rows, size = rank_rows(rank), FACTOR_BYTES[dtype]
        vector = 4 * padded(rows)
        a = ALIGNMENT + 2 * vector
        b = a + size * rows * padded(inputs)
        return cls(ALIGNMENT, ALIGNMENT + vector, a, b, b + size * rows * padded(outputs, COLUMNS))


def padded(count: int, multiple: int = LANES) -> int:
    """The smallest multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


def rank_rows(rank: int) -> int:
    """The rows of factors of a rank: whole groups of `RANK_STEP`."""
    return padded(rank, RANK_STEP)


@dataclass(frozen=True)
class Candidates:
    """Where a program writes the largest logits of each row, as many as the step's input `candidates` requests.

    `counts` (int32 [R]), `places` (int32 [R, capacity]: indices in the row) and `values` (float32 [R, capacity]) are byte
    offsets in the arena. The places and values of a row with a count above the capacity are invalid.
    """

    counts: int
    places: int
    values: int
    capacity: int


@dataclass(frozen=True)
class Launch:
    """How a GPU starts a kernel: the function's name in its module, the threads of a block, the bytes of dynamic shared memory,
    and the `grid` of blocks, whose first axis is multiplied by the number of groups of `rows` rows (by 1 where `rows` is 0).

    A kernel that may `overlap` can be started while the kernels before it still run, and waits for them itself. The other
    fields are for reports: registers and bytes of local memory of a thread, and the tensor-core instructions of the code.
    """

    symbol: str
    threads: int
    shared: int
    grid: tuple[int, ...]
    rows: int
    registers: int
    local: int
    tensor_cores: tuple[str, ...]
    overlap: bool = False

    def blocks(self, count: int) -> tuple[int, int, int]:
        """The grid for `count` rows."""
        x, y, z = self.grid
        return (x * (-(-count // self.rows) if self.rows else 1), y, z)


@dataclass(frozen=True)
class FusionCalls:
    """Kernel calls of one step before and after fusion."""

    before_fusion: int
    after_fusion: int


@dataclass(frozen=True)
class Program:
    """A step of at most `max_tokens` tokens, `max_rows` logit rows and `max_sequences` sequences of `max_blocks` blocks each.

    It is the part of rank `rank` of `ranks`, which run the step together. `vocab_size` is the model's; `kv` has the heads of
    this rank. On a GPU every kernel has an entry in `launches`, and may have `alternatives`, by the bound that a call gives it
    ("any" for None): kernels that compute the same from the same arguments up to this bound. The host runs the fastest of them.

    `weights_header` is the SHA-256 in hex of the header of weights.safetensors, its length and padding included. Shapes,
    strides and sizes are compiled into the kernels, so a file of kernels ends with the `seal` of the program it was made for.

    `adapters` is the layout of adapter slots; None where the program takes no adapters.
    """

    max_tokens: int
    max_rows: int
    max_sequences: int
    max_blocks: int
    arena_bytes: int
    vocab_size: int
    logits: Logits
    kv: KVLayout
    calls: tuple[Call, ...]
    kernel_calls: FusionCalls
    rank: int = 0
    ranks: int = 1
    scratch_bytes: int = 0
    candidates: Candidates | None = None
    launches: dict[str, Launch] = field(default_factory=dict)
    alternatives: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    weights_header: str = ""
    block_size: int = BLOCK_SIZE
    format: int = PROGRAM_FORMAT
    adapters: AdapterLayout | None = field(default=None, metadata=OPTIONAL)

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_blocks * self.block_size

    @property
    def sums(self) -> tuple[tuple[str, int], ...]:
        """The sums over ranks in the order of the calls, as (rows, width)."""
        return tuple((call.rows, call.all_reduce.width) for call in self.calls if call.all_reduce)

    def kernel_names(self) -> tuple[str, ...]:
        """The names of all kernels that the library must export, sorted."""
        called = {name for call in self.calls for _, name in call.kernels()}
        others = (names for by_bound in self.alternatives.values() for names in by_bound.values())
        return tuple(sorted(called.union(*others)))

    def most_rows(self, rows: str) -> int:
        """The largest number of rows of a kind ("T" or "R") in a step."""
        return self.max_tokens if rows == "T" else self.max_rows

    def weight_names(self) -> tuple[str, ...]:
        """The names of all tensors that the weights file must have, sorted."""
        return tuple(sorted({arg.name for call in self.calls for arg in call.args if isinstance(arg, Weight)}))
