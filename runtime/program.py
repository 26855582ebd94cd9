"""program.json: the flat list of the kernel calls of one step, over a memory plan. Backends write it, executors run it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import Refuse, canonical_json, from_plain, refuse_from, to_plain

PROGRAM_FORMAT = 5
PROGRAM_NAME = "program.json"
WEIGHTS_NAME = "weights.safetensors"
BLOCK_SIZE = 16  # tokens of a block of the KV cache
ALIGNMENT = 64  # bytes
INPUTS = ("token_ids", "positions", "sequences", "block_table", "logit_rows", "candidates", "T", "R")
KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of an element
SCALES_BYTES = 4 * BLOCK_SIZE  # of one head of a block of an int8 cache: one float32 for each token
CUBIN = ".cubin"  # ending of a GPU kernel's member in its archive, after the kernel's name
_REBUILD = "rebuild the engine with belle-compile build"


@dataclass(frozen=True)
class Arena:
    """A buffer in the arena; JSON {"arena": byte offset}."""

    offset: int


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
    """Memory outside of the arena that holds zeros between calls; JSON {"scratch": byte offset}."""

    offset: int


Arg = Arena | Weight | Input | KV | Scratch
# The steps that need a call: all of them; those with tokens that are the only ones of their sequence ("alone", as when
# decoding); or those with several tokens of one sequence ("runs", as of a prompt). The kernel itself skips other tokens.
When = Literal["always", "alone", "runs"]


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
    block_size: int = BLOCK_SIZE
    format: int = PROGRAM_FORMAT

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

    def weight_names(self) -> tuple[str, ...]:
        """The names of all tensors that the weights file must have, sorted."""
        return tuple(sorted({arg.name for call in self.calls for arg in call.args if isinstance(arg, Weight)}))

    def to_json(self) -> str:
        """Canonical JSON; raises `EngineError` when the program is inconsistent."""
        _check(self, refuse_from("program", "fix the backend that wrote it"))
        return canonical_json(to_plain(self) | {"calls": [_call_to_plain(call) for call in self.calls]})


def read_program(directory: str | Path) -> Program:
    """Read and validate program.json in the directory of a rank; raises `EngineError`."""
    path = Path(directory) / PROGRAM_NAME
    try:
        return program_from_json(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError:
        raise EngineError("engine", f"file {path} is missing", remedy="copy the engine again or rebuild it") from None


def program_from_json(text: str, where: str = PROGRAM_NAME) -> Program:
    """Parse and validate a program. Raises an `EngineError` that names `where` and the field."""
    refuse = refuse_from(f"engine: {where}", _REBUILD)
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise EngineError("engine", f"{where} is not JSON", found=str(error), remedy=_REBUILD) from None
    if not isinstance(plain, dict) or plain.get("format") != PROGRAM_FORMAT:
        found = str(plain.get("format", "none")) if isinstance(plain, dict) else "no object"
        raise EngineError("engine", f"format of {where}", found=found, expected=str(PROGRAM_FORMAT), remedy=_REBUILD)
    calls = plain.get("calls")
    if not isinstance(calls, list):
        raise refuse("calls", "no list", "a list")
    program = from_plain(Program, plain | {"calls": []}, refuse)
    parsed = tuple(_call_from_plain(call, refuse, f"calls[{i}]") for i, call in enumerate(calls))
    program = replace(program, calls=parsed)
    _check(program, refuse)
    return program


def _call_to_plain(call: Call) -> dict[str, Any]:
    plain: dict[str, Any] = {"kind": call.kind, "node": call.node, "rows": call.rows, "bytes": call.bytes}
    plain["args"] = [_arg_to_plain(arg) for arg in call.args]
    if call.when != "always":
        plain["when"] = call.when
    if call.kernel is not None:
        plain["kernel"] = call.kernel
    if call.all_reduce is not None:
        plain["all_reduce"] = to_plain(call.all_reduce)
    if call.variants:
        plain["variants"] = {"any" if bound is None else str(bound): name for bound, name in call.variants}
    return plain


def _arg_to_plain(arg: Arg) -> dict[str, Any]:
    match arg:
        case Arena(offset):
            return {"arena": offset}
        case Weight(name):
            return {"weight": name}
        case Input(name):
            return {"input": name}
        case KV(layer, part):
            return {"kv": layer, "part": part}
        case Scratch(offset):
            return {"scratch": offset}


def _arg_from_plain(plain: Any, refuse: Refuse, where: str) -> Arg:
    match plain:
        case {"arena": int(offset), **rest} if not rest:
            return Arena(offset)
        case {"weight": str(name), **rest} if not rest:
            return Weight(name)
        case {"input": str(name), **rest} if not rest:
            return Input(name)
        case {"kv": int(layer), "part": "k" | "v" as part, **rest} if not rest:
            return KV(layer, part)
        case {"scratch": int(offset), **rest} if not rest:
            return Scratch(offset)
    raise refuse(where, json.dumps(plain)[:80], "an arena, weight, input, kv or scratch argument")


def _call_from_plain(plain: Any, refuse: Refuse, where: str) -> Call:
    fields = {"kind": str, "node": str, "rows": str, "args": list, "kernel": str, "variants": dict, "bytes": int}
    fields |= {"all_reduce": dict, "when": str}
    if not isinstance(plain, dict):
        raise refuse(where, "no object", "an object")
    for name, value in plain.items():
        if name not in fields or type(value) is not fields[name]:
            raise refuse(f"{where}.{name}", json.dumps(value)[:80], f"a call's fields {', '.join(fields)}")
    for name in ("kind", "node", "rows", "args"):
        if name not in plain:
            raise refuse(f"{where}.{name}", "nothing", "a value")
    variants: list[tuple[int | None, str]] = []
    for bound, name in plain.get("variants", {}).items():
        if not isinstance(name, str) or not (bound == "any" or (bound.isdecimal() and int(bound) > 0)):
            raise refuse(f"{where}.variants", f"{bound}: {name}", 'a row count or "any", and a kernel name')
        variants.append((None if bound == "any" else int(bound), name))
    variants.sort(key=lambda variant: (variant[0] is None, variant[0] or 0))  # JSON's sorted keys put "16" before "4"
    args = tuple(_arg_from_plain(arg, refuse, f"{where}.args[{i}]") for i, arg in enumerate(plain["args"]))
    kernel, read, reduce = plain.get("kernel"), plain.get("bytes", 0), plain.get("all_reduce")
    summed = None if reduce is None else from_plain(AllReduce, reduce, lambda field, *rest: refuse(f"{where}.{field}", *rest))
    when = plain.get("when", "always")
    if when not in get_args(When):
        raise refuse(f"{where}.when", when, " or ".join(get_args(When)))
    return Call(plain["kind"], plain["node"], plain["rows"], args, kernel, tuple(variants), read, summed, when)


def _check(program: Program, refuse: Refuse) -> None:
    """Check that sizes are valid, arguments lie within their buffers, and every call has a kernel for every row count."""
    for name in ("max_tokens", "max_rows", "max_sequences", "max_blocks", "vocab_size"):
        if getattr(program, name) < 1:
            raise refuse(name, str(getattr(program, name)), "at least 1")
    if program.block_size != BLOCK_SIZE:
        raise refuse("block_size", str(program.block_size), str(BLOCK_SIZE))
    if program.kv.dtype not in KV_DTYPES:
        raise refuse("kv.dtype", program.kv.dtype, " or ".join(KV_DTYPES))
    if not 0 <= program.rank < program.ranks:
        raise refuse("rank", f"{program.rank} of {program.ranks}", "a rank below their number")
    logits = program.logits
    end = logits.offset + 4 * logits.stride * program.max_rows
    if logits.offset < 0 or logits.offset % ALIGNMENT or logits.stride < logits.count or end > program.arena_bytes:
        raise refuse("logits", f"bytes {logits.offset} to {end}, stride {logits.stride}", "rows of the vocabulary in the arena")
    last, whole = logits.first + logits.count, logits.count == program.vocab_size
    if logits.first < 0 or logits.count < 1 or last > program.vocab_size or whole != (program.ranks == 1):
        raise refuse("logits", f"tokens {logits.first} to {last}", f"this rank's part of {program.vocab_size}")
    _check_launches(program, refuse)
    for i, call in enumerate(program.calls):
        where = f"calls[{i}] ({call.node})"
        if call.rows not in ("T", "R"):
            raise refuse(f"{where}.rows", str(call.rows), "T or R")
        most = program.max_tokens if call.rows == "T" else program.max_rows
        if call.all_reduce:
            _check_all_reduce(program, call, call.all_reduce, most, refuse, where)
        else:
            last_bound, last_name = call.kernels()[-1]
            if not last_name or (last_bound is not None and last_bound < most):
                raise refuse(f"{where}.kernel", last_name or "none", f"a kernel for up to {most} rows")
        for arg in call.args:
            _check_arg(program, arg, refuse, where)


def _check_launches(program: Program, refuse: Refuse) -> None:
    """Check that every kernel of a GPU can be started, and that candidates lie in the arena."""
    if program.launches and (missing := set(program.kernel_names()) - set(program.launches)):
        raise refuse("launches", f"none of {min(missing)}", "one of every kernel")
    for name, launch in program.launches.items():
        if len(launch.grid) != 3 or min(launch.grid) < 1 or launch.rows < 0 or not 0 < launch.threads <= 1024:
            raise refuse(
                f"launches.{name}", f"grid {launch.grid}, {launch.threads} threads", "a grid of three, 1 to 1024 threads"
            )
    if layout := program.candidates:
        size = 4 * layout.capacity * program.max_rows
        ends = layout.counts + 4 * program.max_rows, layout.places + size, layout.values + size
        if min(layout.counts, layout.places, layout.values) < 0 or max(ends) > program.arena_bytes or layout.capacity < 1:
            raise refuse("candidates", f"bytes up to {max(ends)}", "rows in the arena")


def _check_all_reduce(program: Program, call: Call, summed: AllReduce, rows: int, refuse: Refuse, where: str) -> None:
    match call.args:
        case (Arena(offset),) if program.ranks > 1 and not call.kernel and not call.variants:
            end = offset + 4 * summed.stride * rows
            if not 0 < summed.width <= summed.stride or end > program.arena_bytes:
                found = f"{summed.width} of {summed.stride} elements, bytes {offset} to {end}"
                raise refuse(f"{where}.all_reduce", found, "rows in the arena")
        case _:
            found, expected = "other arguments, a kernel, or one rank", "one arena argument and several ranks"
            raise refuse(f"{where}.all_reduce", found, expected)


def _check_arg(program: Program, arg: Arg, refuse: Refuse, where: str) -> None:
    match arg:
        case Arena(offset) if offset < 0 or offset >= program.arena_bytes or offset % ALIGNMENT:
            raise refuse(f"{where}.args", f"arena offset {offset}", f"a multiple of 64 below {program.arena_bytes}")
        case Scratch(offset) if not 0 <= offset < program.scratch_bytes:
            raise refuse(f"{where}.args", f"scratch offset {offset}", f"one below {program.scratch_bytes}")
        case Input(name) if name not in INPUTS:
            raise refuse(f"{where}.args", f"input {name}", "one of " + ", ".join(INPUTS))
        case KV(layer, _) if not 0 <= layer < program.kv.layers:
            raise refuse(f"{where}.args", f"kv layer {layer}", f"a layer below {program.kv.layers}")
        case _:
            return
