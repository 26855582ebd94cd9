"""program.json: the text of a program, which is checked as a whole before a pointer is made from it, and its seal."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program import (
    ALIGNMENT,
    BLOCK_SIZE,
    FACTOR_BYTES,
    INPUTS,
    KV,
    KV_DTYPES,
    PROGRAM_FORMAT,
    PROGRAM_NAME,
    Adapter,
    AdapterLayout,
    AllReduce,
    Arena,
    Arg,
    Call,
    Input,
    Program,
    Scratch,
    Weight,
    When,
)
from belle_compile.runtime.schema import Refuse, canonical_json, from_plain, parse_json, refuse_from, to_plain

_REBUILD = "rebuild the engine with belle-compile build"


def read_program(directory: str | Path) -> Program:
    """Read and validate program.json in the directory of a rank; raises `EngineError`."""
    path = Path(directory) / PROGRAM_NAME
    return program_from_json(_read(path), where=str(path))


def program_to_json(program: Program) -> str:
    """Canonical JSON; raises `EngineError` when the program is inconsistent."""
    _check(program, refuse_from("program", "fix the backend that wrote it"))
    return canonical_json(to_plain(program) | {"calls": [_call_to_plain(call) for call in program.calls]})


def program_from_json(text: str | bytes, where: str = PROGRAM_NAME) -> Program:
    """Parse and validate a program. Raises an `EngineError` that names `where` and the field."""
    refuse = refuse_from(f"engine: {where}", _REBUILD)
    try:
        plain = parse_json(text)
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


def seal(text: str | bytes) -> bytes:
    """The last bytes of a file of kernels that was made for a program with this text: its SHA-256 in hex."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest().encode()


def check_seal(directory: Path, kernels: Path) -> None:
    """Raise `EngineError` where a file of kernels is missing, or was made for another program than that of the directory.

    Kernels trust their arguments, so nothing of a program may reach them before this check.
    """
    expected = seal(_read(directory / PROGRAM_NAME))
    try:
        with open(kernels, "rb") as file:
            file.seek(-min(len(expected), os.fstat(file.fileno()).st_size), os.SEEK_END)
            found = file.read()
    except OSError as error:
        raise _unreadable(kernels, error) from None
    if found != expected:
        what = f"{kernels.name} was made for another {PROGRAM_NAME} than that of {directory}"
        raise EngineError("engine", what, remedy="copy the engine again or rebuild it")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> EngineError:
    remedy = "copy the engine again or rebuild it"
    if isinstance(error, FileNotFoundError):
        return EngineError("engine", f"file {path} is missing", remedy=remedy)
    return EngineError("engine", f"file {path} cannot be read", found=error.strerror or str(error), remedy=remedy)


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
        case Arena(offset, size, rows):
            return {"arena": offset, "bytes": size} | ({"rows": rows} if rows else {})
        case Weight(name):
            return {"weight": name}
        case Input(name):
            return {"input": name}
        case KV(layer, part):
            return {"kv": layer, "part": part}
        case Scratch(offset, size):
            return {"scratch": offset, "bytes": size}
        case Adapter(target):
            return {"adapter": target}


def _arg_from_plain(plain: Any, refuse: Refuse, where: str) -> Arg:
    match plain:
        case {"arena": offset, "bytes": size, "rows": "T" | "R" as rows, **rest} if not rest and _whole(offset, size):
            return Arena(offset, size, rows)
        case {"arena": offset, "bytes": size, **rest} if not rest and _whole(offset, size):
            return Arena(offset, size)
        case {"weight": str(name), **rest} if not rest:
            return Weight(name)
        case {"input": str(name), **rest} if not rest:
            return Input(name)
        case {"kv": layer, "part": "k" | "v" as part, **rest} if not rest and _whole(layer):
            return KV(layer, part)
        case {"scratch": offset, "bytes": size, **rest} if not rest and _whole(offset, size):
            return Scratch(offset, size)
        case {"adapter": str(target), **rest} if not rest:
            return Adapter(target)
    raise refuse(where, json.dumps(plain)[:80], "an arena, weight, input, kv, scratch or adapter argument")


def _whole(*numbers: object) -> bool:
    """Whether all are integers; True and False are none."""
    return all(type(number) is int for number in numbers)


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
    for name in ("layers", "kv_heads", "head_dim"):
        if getattr(program.kv, name) < 1:
            raise refuse(f"kv.{name}", str(getattr(program.kv, name)), "at least 1")
    if min(program.arena_bytes, program.scratch_bytes) < 0:
        raise refuse("arena_bytes", f"{program.arena_bytes}, scratch_bytes {program.scratch_bytes}", "at least 0")
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
    _check_adapters(program, refuse)
    for i, call in enumerate(program.calls):
        where = f"calls[{i}] ({call.node})"
        if call.rows not in ("T", "R"):
            raise refuse(f"{where}.rows", str(call.rows), "T or R")
        most = program.most_rows(call.rows)
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


def _check_adapters(program: Program, refuse: Refuse) -> None:
    """Check that the layout of adapter slots is the one that kernels are compiled for."""
    if layout := program.adapters:
        sizes = {name: (region.inputs, region.outputs, region.dtype) for name, region in layout.regions.items()}
        if layout.rank < 1 or any(min(inputs, outputs) < 1 for inputs, outputs, _ in sizes.values()):
            raise refuse("adapters", f"rank {layout.rank} and sizes {min(sizes.values())}", "at least 1")
        if unknown := {dtype for _, _, dtype in sizes.values()} - {*FACTOR_BYTES}:
            raise refuse("adapters", f"factors of {min(unknown)}", " or ".join(FACTOR_BYTES))
        # JSON sorts the names of regions; their places are in another order.
        in_turn = dict(sorted(sizes.items(), key=lambda item: layout.regions[item[0]].offset))
        if AdapterLayout.of(layout.rank, in_turn) != layout:
            raise refuse("adapters", "regions elsewhere", "regions one after the other that fill a slot")


def _check_all_reduce(program: Program, call: Call, summed: AllReduce, rows: int, refuse: Refuse, where: str) -> None:
    match call.args:
        case (Arena() as arg,) if program.ranks > 1 and not call.kernel and not call.variants:
            if not 0 < summed.width <= summed.stride or 4 * summed.stride * rows > _arena_bytes(program, arg):
                found = f"{summed.width} of {summed.stride} elements, {rows} rows"
                raise refuse(f"{where}.all_reduce", found, f"rows in the {_arena_bytes(program, arg)} bytes of its argument")
        case _:
            found, expected = "other arguments, a kernel, or one rank", "one arena argument and several ranks"
            raise refuse(f"{where}.all_reduce", found, expected)


def _check_arg(program: Program, arg: Arg, refuse: Refuse, where: str) -> None:
    match arg:
        case Arena(offset) if offset < 0 or offset % ALIGNMENT or arg.bytes < 1:
            raise refuse(f"{where}.args", f"arena offset {offset}, {arg.bytes} bytes", "a multiple of 64, and a size")
        case Arena(offset) if offset + _arena_bytes(program, arg) > program.arena_bytes:
            found = f"arena bytes {offset} to {offset + _arena_bytes(program, arg)}"
            raise refuse(f"{where}.args", found, f"bytes within {program.arena_bytes}")
        case Scratch(offset, size) if offset < 0 or size < 1 or offset + size > program.scratch_bytes:
            raise refuse(f"{where}.args", f"scratch bytes {offset} to {offset + size}", f"bytes within {program.scratch_bytes}")
        case Input(name) if name not in INPUTS:
            raise refuse(f"{where}.args", f"input {name}", "one of " + ", ".join(INPUTS))
        case Adapter(target) if program.adapters is None or target not in program.adapters.regions:
            raise refuse(f"{where}.args", f"adapter {target}", "a linear of the adapters' layout")
        case KV(layer, _) if not 0 <= layer < program.kv.layers:
            raise refuse(f"{where}.args", f"kv layer {layer}", f"a layer below {program.kv.layers}")
        case _:
            return


def _arena_bytes(program: Program, arg: Arena) -> int:
    """Bytes of the whole buffer that an argument points to."""
    return arg.bytes * (program.most_rows(arg.rows) if arg.rows else 1)
