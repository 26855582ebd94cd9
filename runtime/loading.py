"""Loads the parts of an engine from its directory, in one process or as one of several ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from belle_compile.runtime.adapters.basis import check_takes_adapters
from belle_compile.runtime.artifact import STAGE, Manifest, Progress, read_manifest, verify_files
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.agreement import Report, agree, refuse
from belle_compile.runtime.distributed.collectives import Collectives, join_ranks
from belle_compile.runtime.distributed.executor import ranked_executor, serve
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.executors import Executor, LoadRequest, RankExecutor, executor_of
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """The arguments of `Engine.load`; `full` asks for the digests of all files, weights included."""

    threads: int | None
    isa: str | None
    kv_tokens: int | None
    full: bool
    progress: Progress | None
    kv_cache_memory: str | float | None = None
    adapter_slots: int = 0


def load_parts(directory: Path, options: Options, beside: Executor | None = None) -> tuple[Manifest, Tokenizer, Executor]:
    """Check and load an engine, in one process `beside` the executor of another one, which never runs at the same time.

    Of several ranks only rank 0 returns: the others run the steps that it sends until it closes its executor, and end their
    process with `SystemExit`.
    """
    place = ranks.place()
    if place is not None:
        return _load_ranks(directory, options, join_ranks(place))
    manifest = read_manifest(directory)
    if (count := manifest.target.ranks) > 1:
        remedy = f"use belle-run --ranks {count}, or start this program with mpiexec -n {count}"
        raise _other_ranks("1 process", count, remedy)
    return manifest, *_load_rank(directory, manifest, options, None, beside)


def check_ranks(manifest: Manifest, requested: int) -> None:
    """Raise `EngineError` where an engine was built for another number of ranks than `requested`."""
    count = manifest.target.ranks
    if requested != count:
        remedy = f"run it with {count}, or make an engine for {requested} with belle-compile repartition"
        raise _other_ranks(str(requested), count, remedy)


def _other_ranks(found: str, count: int, remedy: str) -> EngineError:
    return EngineError(STAGE, "ranks", found=found, expected=f"{count}, what the engine was built for", remedy=remedy)


def _load_rank(
    directory: Path, manifest: Manifest, options: Options, collectives: Collectives | None, beside: Executor | None = None
) -> tuple[Tokenizer, Executor]:
    """Check host and files, then load one rank. No kernel is loaded before the checks have passed."""
    kv_memory = KvMemory.parse(options.kv_tokens, options.kv_cache_memory)
    rank, ranks_here = (collectives.rank, collectives.ranks_here) if collectives else (0, 1)
    factory = executor_of(manifest)
    factory.check_host(manifest.target, ranks_here)
    if options.adapter_slots:
        check_takes_adapters(manifest)
    verify_files(directory, manifest, full=options.full, progress=options.progress, rank=rank)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json", manifest.special_tokens)
    request = LoadRequest(
        directory / f"rank{rank}",
        manifest,
        options.threads,
        options.isa,
        kv_memory,
        collectives,
        options.adapter_slots,
        beside,
    )
    return tokenizer, factory.load(request)


def _load_ranks(directory: Path, options: Options, collectives: Collectives) -> tuple[Manifest, Tokenizer, Executor]:
    """Load this rank, and check with the others that they belong to one engine. Only rank 0 raises the error if they do not."""
    timeout_s = ranks.timeout_s()
    try:
        manifest = read_manifest(directory)
        check_ranks(manifest, collectives.ranks)
        tokenizer, executor = _load_rank(directory, manifest, options, collectives)
        if not isinstance(executor, RankExecutor):
            found = f"an engine of {manifest.target.backend} in {collectives.ranks} ranks"
            raise EngineError(STAGE, "this executor runs engines of one rank", found=found, remedy="rebuild it for one rank")
    except BelleError as error:
        refuse(error, collectives, timeout_s)
    agreement = agree(Report.of(manifest.digest, executor), collectives, timeout_s)
    executor.join(collectives)
    if collectives.rank:
        serve(executor, collectives)
        sys.exit(0)
    return manifest, tokenizer, ranked_executor(executor, collectives, agreement)
