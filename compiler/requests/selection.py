"""Select calibration and held-out requests from a stream: redacted, without duplicates, stratified, determined by a seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.duplicates import EXACT, NEAR, Duplicates, content_digest, normalized
from belle_compile.compiler.requests.redaction import redact
from belle_compile.compiler.requests.request import STAGE, Request
from belle_compile.compiler.requests.strata import Sample, Stratum, apportion, bucket
from belle_compile.compiler.requests.units import Unit, Units

EMPTY, SHORT, LONG = "empty", "too short", "too long"
REASONS = (EMPTY, SHORT, LONG, EXACT, NEAR)  # the reasons to drop a request, in the order in which they are checked

_SHORTEST = 2  # the fewest characters of normalized text, or token ids, of a request that is kept
_BATCH = 2048  # requests
_MOST_VALUES = 1000  # the most different values of a label


@dataclass(frozen=True)
class SelectOptions:
    """Options of a selection. `size` and `holdout` are numbers of requests; requests are stratified by length and `labels`.

    Two requests are near duplicates from `similarity` on (see `Duplicates`). `max_length` is in tokens, or in characters if
    there is no tokenizer.
    """

    size: int = 512
    holdout: int = 128
    seed: int = 0
    labels: tuple[str, ...] = ()
    redact: bool = False
    similarity: float = 0.8
    max_length: int = 32768

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("size", self.size, self.size >= 1, "1 or more"),
            ("holdout", self.holdout, self.holdout >= 0, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 1 << 64, "0 or more, below 2**64"),
            ("similarity", self.similarity, 0 < self.similarity <= 1, "above 0, up to 1"),
            ("max_length", self.max_length, self.max_length >= 1, "1 or more"),
        ):
            if not fits:
                raise CompileError(STAGE, f"option {name}", found=str(value), expected=expected)


@dataclass
class Census:
    """Statistics of a group of requests: their number, lengths, labels and units."""

    requests: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    units: Counter[Unit] = field(default_factory=Counter)

    def add(self, request: Request, units: Sequence[Unit]) -> None:
        self.requests += 1
        self.lengths[len(units)] += 1
        for name, value in request.labels.items():
            self.labels.setdefault(name, Counter())[value] += 1

    def add_units(self, units: Sequence[Unit]) -> None:
        self.units.update(units)


@dataclass(frozen=True)
class Selection:
    """The selected requests in the order of the file, and a census of those that were read, kept (without units) and selected.

    `redacted` counts placeholders by kind; it is None without redaction. `strata` counts the strata of the requests that were
    kept, `strata_left_out` those of them without a calibration request.
    """

    calibration: tuple[Request, ...]
    holdout: tuple[Request, ...]
    read: Census
    kept: Census
    calibrating: Census
    held_out: Census
    dropped: dict[str, int]
    redacted: dict[str, int] | None
    strata: int
    strata_left_out: int
    shared_beginning: str


def select(requests: Iterable[Request], options: SelectOptions, units: Units) -> Selection:
    """Read all requests once and select `options.size` to calibrate with and `options.holdout` others to hold out.

    Memory holds digests and sketches of the distinct requests, about 3 kB each, and at most size + holdout requests per
    stratum. The selection depends on the seed and on the requests, not on their order, except that the first of several
    duplicates is kept. If fewer than size + holdout are left, both parts get their share. Raises CompileError if none is left.
    """
    places = options.size + options.holdout
    duplicates = Duplicates(options.similarity)
    read, kept = Census(), Census()
    dropped: Counter[str] = Counter()
    redacted: Counter[str] = Counter(phone=0, email=0, id=0)
    samples: dict[Stratum, Sample] = {}
    for batch in _batches(requests):
        if options.redact:
            for place, request in enumerate(batch):
                batch[place], counts = redact(request)
                redacted.update(counts)
        split = units.split(batch)
        for request, parts in zip(batch, split, strict=True):
            read.add(request, parts)
            read.add_units(parts)
        _check_labels(read)
        lengths = [_unfit(request, len(parts), options) for request, parts in zip(batch, split, strict=True)]
        fit = [place for place, reason in enumerate(lengths) if reason is None]
        verdicts = duplicates.judge([batch[place] for place in fit])
        dropped.update(reason for reason in lengths if reason is not None)
        dropped.update(reason for reason in verdicts if reason is not None)
        for place, verdict in zip(fit, verdicts, strict=True):
            if verdict is None:
                request, parts = batch[place], split[place]
                kept.add(request, parts)
                stratum = bucket(len(parts)), tuple(request.labels[name] for name in options.labels)
                samples.setdefault(stratum, Sample(places)).offer(_priority(request, options.seed), request)
    if not kept.requests:
        found = ", ".join(f"{dropped[reason]} {reason}" for reason in REASONS if dropped[reason])
        raise CompileError(STAGE, "no request is left", found=found, expected="requests with text in them")
    calibration, holdout, left_out = _choose(samples, options, kept.requests)
    return Selection(
        calibration=calibration,
        holdout=holdout,
        read=read,
        kept=kept,
        calibrating=_census(calibration, units),
        held_out=_census(holdout, units),
        dropped={reason: dropped[reason] for reason in REASONS},
        redacted=dict(redacted) if options.redact else None,
        strata=len(samples),
        strata_left_out=left_out,
        shared_beginning=duplicates.shared_beginning or "",
    )


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    stream = iter(requests)
    while batch := list(islice(stream, _BATCH)):
        yield batch


def _unfit(request: Request, length: int, options: SelectOptions) -> str | None:
    """The reason why a request's length excludes it, or None."""
    if length > options.max_length:
        return LONG
    content = len(normalized(request.written())) if request.token_ids is None else len(request.token_ids)
    return None if content >= _SHORTEST else SHORT if content else EMPTY


def _check_labels(read: Census) -> None:
    for name, values in read.labels.items():
        if len(values) > _MOST_VALUES:
            raise CompileError(
                STAGE,
                f"label field {name}",
                found=f"more than {_MOST_VALUES} different values in {read.requests} requests",
                expected="a few, such as kinds of requests",
                remedy="choose another field",
            )


def _priority(request: Request, seed: int) -> int:
    digest = hashlib.blake2b(content_digest(request), digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


def _choose(
    samples: dict[Stratum, Sample], options: SelectOptions, kept: int
) -> tuple[tuple[Request, ...], tuple[Request, ...], int]:
    """Divide requests into calibration and holdout, each sorted by line, and count the strata without a calibration request."""
    places = options.size + options.holdout
    holdout_size = options.holdout
    if kept < places:
        holdout_size = max(kept * options.holdout // places, 1 if options.holdout and kept > 1 else 0)
    strata = sorted(samples)
    sizes = [samples[stratum].offered for stratum in strata]
    chosen = apportion(min(places, kept), sizes, sizes)
    # The only request of a stratum is used for calibration, unless too few strata have more than one.
    spare = [max(count - 1, 0) for count in chosen]
    held_out = apportion(holdout_size, chosen, spare if sum(spare) >= holdout_size else chosen)
    calibration: list[Request] = []
    holdout: list[Request] = []
    for stratum, count, held in zip(strata, chosen, held_out, strict=True):
        requests = samples[stratum].chosen(count)
        holdout += requests[:held]
        calibration += requests[held:]
    left_out = sum(count == held for count, held in zip(chosen, held_out, strict=True))
    by_line = attrgetter("line")
    return tuple(sorted(calibration, key=by_line)), tuple(sorted(holdout, key=by_line)), left_out


def _census(requests: Sequence[Request], units: Units) -> Census:
    census = Census()
    for request, parts in zip(requests, units.split(requests), strict=True):
        census.add(request, parts)
        census.add_units(parts)
    return census
