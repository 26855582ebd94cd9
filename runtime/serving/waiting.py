"""The sequences that wait to be admitted, and which of them is next."""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterable

from belle_compile.runtime.serving.sequence import Sequence

_MOST_IDLE = 1024  # counters kept of clients that do not wait, beyond as many as wait


class _Level:
    """The sequences of one priority: those that were first once, by arrival, and the others by client."""

    def __init__(self) -> None:
        self.picked: list[Sequence] = []
        self.clients: dict[str, OrderedDict[Sequence, None]] = {}

    def __bool__(self) -> bool:
        return bool(self.picked or self.clients)


class WaitingQueue:
    """Orders waiting sequences: by priority, the lowest number first. Within one, those come first that were taken out before
    (they were preempted, or waited for a prefix), by arrival; then the one that arrived first of the client that was served the
    fewest tokens.

    The fairness is that of virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A
    client's counter grows by the length of its prompts when they are taken out, and by the tokens of its answers. When a client
    begins to wait, its counter is lifted to the smallest one of the clients that wait, or else to that of the last one that
    did: nobody gathers credit while idle.

    Nobody starves within a priority. The counter of a client that waits does not change while it gets nothing, and those of
    the clients that are served before it grow past it. Counters of clients that begin to wait are at least as large, and where
    they are equal the earlier arrival is first.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._length = 0
        self._served: dict[str, int] = {}  # counters of clients, in tokens
        self._waiting: Counter[str] = Counter()  # sequences of each client that were not taken out before
        self._last = 0  # counter of the client that stopped waiting last

    def __len__(self) -> int:
        return self._length

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, for the first time or after it was taken out."""
        scheduling = sequence.scheduling
        level = self._levels.setdefault(scheduling.priority, _Level())
        if sequence.picked:
            insort(level.picked, sequence, key=lambda other: other.rank)
        else:
            client = scheduling.client
            if client not in self._waiting:
                self._lift(client)
            self._waiting[client] += 1
            level.clients.setdefault(client, OrderedDict())[sequence] = None
        self._length += 1

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence; returns False if it is not here."""
        scheduling = sequence.scheduling
        level = self._levels.get(scheduling.priority)
        if level is None:
            return False
        if sequence.picked:
            if sequence not in level.picked:
                return False
            level.picked.remove(sequence)
        else:
            client = scheduling.client
            if sequence not in level.clients.get(client, ()):
                return False
            del level.clients[client][sequence]
            if not level.clients[client]:
                del level.clients[client]
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]
                self._last = self._served[client]
        if not level:
            del self._levels[scheduling.priority]
        self._length -= 1
        return True

    def first(self) -> Sequence | None:
        """The next sequence, which stays in the queue; None if it is empty."""
        if not self._levels:
            return None
        level = self._levels[min(self._levels)]
        if level.picked:
            return level.picked[0]
        heads = (next(iter(sequences)) for sequences in level.clients.values())
        return min(heads, key=lambda sequence: (self._served[sequence.scheduling.client], sequence.rank))

    def take(self, sequence: Sequence) -> None:
        """Take out the first sequence, and charge its client for the tokens of its prompt."""
        self.remove(sequence)
        sequence.picked = True
        self.charge((sequence,))

    def charge(self, sequences: Iterable[Sequence]) -> None:
        """Add to the counters of clients the tokens that their sequences got since they were charged last."""
        for sequence in sequences:
            if sequence.length > sequence.charged:
                client = sequence.scheduling.client
                self._served[client] = self._served.get(client, 0) + sequence.length - sequence.charged
                sequence.charged = sequence.length

    def _lift(self, client: str) -> None:
        """Lift the counter of a client that begins to wait, and forget those that would be lifted as far."""
        least = min((self._served[other] for other in self._waiting), default=self._last)
        if len(self._served) > 2 * len(self._waiting) + _MOST_IDLE:
            self._served = {name: n for name, n in self._served.items() if n > least or name in self._waiting}
        self._served[client] = max(self._served.get(client, 0), least)
