"""A cache of weights that have been read: bounded in bytes, and safe between threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]


class Kind(Enum):
    """A kind of value, which determines how long the cache holds it."""

    RESULT = "several tensors computed at once"  # the latest one, until another is computed
    WHOLE = "a tensor of which parts are taken"  # inside of `keeping(Kind.WHOLE)`
    TENSOR = "any lazy tensor"  # inside of `keeping(Kind.TENSOR)`


@dataclass(eq=False)
class _Shelf:
    """Room for values of one kind: `most` bytes, of which `held` are taken."""

    most: int
    held: int = 0


@dataclass(frozen=True)
class _Entry:
    arrays: Arrays
    shelf: _Shelf

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


Key = tuple[Kind, Hashable]


class ReadCache:
    """Arrays by kind and key, at most `bound` bytes of them; the least recently used ones are dropped first.

    Held arrays are read-only, since all readers see the same memory. Threads that ask for the same key at the same time wait
    for one of them to compute it; a `compute` may itself read other keys. Values larger than the bound are computed at every
    read.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._changed = threading.Condition()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # the least recently used one first
        self._shelves: dict[Kind, list[_Shelf]] = {kind: [] for kind in Kind}  # the innermost one last
        self._shelves[Kind.RESULT].append(_Shelf(bound))
        self._computing: set[Key] = set()
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes held now; an array that two keys share counts for both."""
        return self._held

    @contextmanager
    def keeping(self, kind: Kind, most: int | None = None) -> Iterator[None]:
        """Hold values of a kind while a `with` block runs, at most `most` bytes of them (None: up to the cache's bound)."""
        shelf = _Shelf(self.bound if most is None else most)
        with self._changed:
            self._shelves[kind].append(shelf)
        try:
            yield
        finally:
            with self._changed:
                self._shelves[kind].remove(shelf)
                self._clear(shelf)

    def read(self, kind: Kind, key: Hashable, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays held for a key, else those that `compute` returns, which are then held where their kind is.

        Keys are compared by hash and equality, so `key` must stay alive as long as it may be read.
        """
        entry_key = kind, key
        with self._changed:
            while entry_key in self._computing:
                self._changed.wait()
            if entry_key in self._entries:
                self._entries.move_to_end(entry_key)
                return self._entries[entry_key].arrays
            shelf = self._shelves[kind][-1] if self._shelves[kind] else None
            if shelf is not None:
                self._computing.add(entry_key)
                if kind is Kind.RESULT:
                    self._clear(shelf)  # frees the old result before the new one is made
        if shelf is None:
            return compute()
        try:
            arrays = tuple(map(_read_only, compute()))
            with self._changed:
                self._hold(entry_key, _Entry(arrays, shelf))
            return arrays
        finally:
            with self._changed:
                self._computing.remove(entry_key)
                self._changed.notify_all()

    def _hold(self, key: Key, entry: _Entry) -> None:
        """Add an entry, and drop others to make room; do nothing for one that is too large, or whose `with` block has ended."""
        kind, size = key[0], entry.bytes
        if entry.shelf not in self._shelves[kind] or size > min(entry.shelf.most, self.bound):
            return
        if kind is Kind.RESULT:
            self._clear(entry.shelf)
        while entry.shelf.held + size > entry.shelf.most:
            self._drop(next(oldest for oldest, held in self._entries.items() if held.shelf is entry.shelf))
        while self._held + size > self.bound:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        entry.shelf.held += size
        self._held += size

    def _clear(self, shelf: _Shelf) -> None:
        for key in [key for key, entry in self._entries.items() if entry.shelf is shelf]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key)
        entry.shelf.held -= entry.bytes
        self._held -= entry.bytes


def _read_only(array: Array) -> Array:
    view: Array = np.asarray(array).view()
    view.setflags(write=False)
    return view
