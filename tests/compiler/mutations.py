"""Load an engine once for each mutation of a JSON file in it, digested again, and answer a prompt where it loads.

    python -m tests.compiler.mutations ENGINE FILE COUNT

Prints how each ended, as JSON. A kernel that follows a wrong pointer ends this process.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.artifact import MANIFEST_NAME, FileRecord, Manifest, manifest_text, read_manifest
from belle_compile.runtime.errors import BelleError
from belle_compile.runtime.schema import canonical_json

Place = tuple[Any, ...]
VALUES: list[Any] = [None, True, "", "x", [], {}, -1, 0, 1, 2**31, 2**63, 10**40, 1.5]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Yield the keys that lead to every value inside of `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutate(original: Any, every: list[Place], chance: random.Random) -> tuple[Any, str, Place]:
    """Return a copy with one value set, deleted, or exchanged with a neighbour; how, and where."""
    at, changed = chance.choice(every), copy.deepcopy(original)
    holder = changed
    for key in at[:-1]:
        holder = holder[key]
    old, kind = holder[at[-1]], chance.choice(("set", "set", "set", "delete", "swap"))
    if kind == "delete":
        del holder[at[-1]]
    elif kind == "swap":
        other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[at[-1]], holder[other] = holder[other], holder[at[-1]]
    else:
        holder[at[-1]] = chance.choice([*_near(old), *VALUES])
    return changed, kind, at


def _near(old: Any) -> list[Any]:
    if isinstance(old, int) and not isinstance(old, bool):
        return [old + 1, old - 1, old * 2, old // 2, old + 64, old + 16, -old, 2**40]
    return [old[1:], old + old[:1], old[::-1]] if isinstance(old, list) and old else []


def write(engine: Path, manifest: Manifest, name: str, changed: Any) -> None:
    """Write the changed file, and the digests that fit it."""
    if name == MANIFEST_NAME:
        digest = hashlib.sha256(canonical_json(changed | {"digest": ""}).encode()).hexdigest()
        (engine / name).write_text(canonical_json(changed | {"digest": digest}), encoding="utf-8")
        return
    text = json.dumps(changed).encode()
    (engine / name).write_bytes(text)
    record = FileRecord(hashlib.sha256(text).hexdigest(), len(text))
    complete = dataclasses.replace(manifest, files=dict(manifest.files) | {name: record})
    (engine / MANIFEST_NAME).write_text(manifest_text(complete), encoding="utf-8")


def use(engine: Path) -> str:
    """Load the engine and answer a prompt; returns how that ended."""
    try:
        with Engine.load(engine, threads=1, kv_tokens=64) as loaded:
            loaded.generate([[5, 6, 7]], SamplingParams(max_new_tokens=2))
            loaded.generate("hello", SamplingParams(max_new_tokens=2))
    except BelleError:
        return "refused"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return f"{type(error).__name__}: {error}"
    return "answered"


def main() -> None:
    engine, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    manifest, original = read_manifest(engine), json.loads((engine / name).read_text(encoding="utf-8"))
    every = list(places(original))
    for number in range(count):
        changed, kind, at = mutate(original, every, random.Random(number))
        write(engine, manifest, name, changed)
        print(json.dumps([number, kind, at, use(engine)]), flush=True)


if __name__ == "__main__":
    main()
