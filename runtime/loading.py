"""From an engine directory to the parts of an engine, in one process or as one of several ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.runtime import host
from belle_compile.runtime.artifact import Manifest, Progress, check_host, read_manifest, verify_files
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.collectives import Collectives, MpiCollectives
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from belle_compile.runtime.executors import Executor


@dataclass(frozen=True)
class Options:
    """What `Engine.load` was given."""

    threads: int | None
    isa: str | None
    kv_tokens: int | None
    full: bool
    progress: Progress | None


def load_parts(directory: Path, options: Options) -> tuple[Manifest, Tokenizer, Executor]:
    """Check and load an engine. Of several ranks only rank 0 comes back; the others serve it, and end their process."""
    here = ranks.place()
    if here is not None:
        collectives = MpiCollectives(abort=_exit if ranks.supervised() else None)
        if collectives.ranks != here.ranks:
            collectives.close()
            remedy = "start them with the mpiexec of the MPI that mpi4py uses, or with srun --mpi=pmi2"
            found, expected = f"{collectives.ranks} in MPI's world", f"{here.ranks}, as the environment says"
            raise EngineError("ranks", "MPI", found=found, expected=expected, remedy=remedy)
        return _load_ranks(directory, options, collectives)
    manifest = read_manifest(directory)
    if (count := manifest.target.ranks) > 1:
        remedy = f"use belle-run --ranks {count}, or start this program with mpiexec -n {count}"
        raise EngineError(
            "engine", "ranks", found="1 process", expected=f"{count}, what the engine was built for", remedy=remedy
        )
    return manifest, *_load_rank(directory, manifest, options, None)


def check_ranks(manifest: Manifest, wanted: int) -> None:
    """Raise `EngineError` when an engine was built for another number of ranks."""
    count = manifest.target.ranks
    if wanted != count:
        remedy = f"run it with {count}, or make an engine for {wanted} with belle-compile repartition"
        raise EngineError(
            "engine", "ranks", found=str(wanted), expected=f"{count}, what the engine was built for", remedy=remedy
        )


def _load_rank(
    directory: Path, manifest: Manifest, options: Options, collectives: Collectives | None
) -> tuple[Tokenizer, Executor]:
    rank, here = (collectives.rank, collectives.ranks_here) if collectives else (0, 1)
    check_host(manifest, here)
    verify_files(directory, manifest, full=options.full, progress=options.progress, rank=rank)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json", manifest.special_tokens)
    if manifest.target.is_gpu:
        return tokenizer, _on_gpu(directory / f"rank{rank}", manifest, options, collectives.rank_here if collectives else 0)
    from belle_compile.runtime.executors.cpu import CpuExecutor  # loads no kernels before the checks

    threads = options.threads
    if threads is None and collectives:
        threads = max(1, len(host.usable_cores()) // collectives.sharing)
    executor = CpuExecutor(
        directory / f"rank{rank}", manifest.target.isas, threads=threads, isa=options.isa, kv_tokens=options.kv_tokens,
        collectives=collectives,
    )  # fmt: skip
    return tokenizer, executor


def _on_gpu(directory: Path, manifest: Manifest, options: Options, number: int) -> Executor:
    if options.isa is not None and options.isa not in manifest.target.isas:
        found, expected = options.isa, ", ".join(manifest.target.isas)
        raise EngineError("engine", "instruction set", found=found, expected=f"{expected}, what the engine was built for")
    from belle_compile.runtime.executors.cuda import CudaExecutor

    return CudaExecutor(directory, manifest.target.isas, kv_tokens=options.kv_tokens, number=number)


def _load_ranks(directory: Path, options: Options, collectives: Collectives) -> tuple[Manifest, Tokenizer, Executor]:
    """Load this rank and agree with the others that they belong together; what does not fit is said once, by rank 0."""
    from belle_compile.runtime.executors.ranked import RankedExecutor, serve, sums_of

    loaded: tuple[Manifest, Tokenizer, Executor] | None = None
    try:
        manifest = read_manifest(directory)
        check_ranks(manifest, collectives.ranks)
        loaded = manifest, *_load_rank(directory, manifest, options, collectives)
        program, blocks = loaded[2].program, loaded[2].num_blocks
        words: dict[str, Any] = {
            "digest": manifest.digest, "span": (program.logits.first, program.logits.count), "blocks": blocks,
            "vocabulary": program.vocab_size, "sums": sums_of(program),
        }  # fmt: skip
    except BelleError as error:
        words = {"error": _fields(error)}
    timeout = ranks.timeout_s()
    verdict = json.loads(collectives.agree(json.dumps(words).encode(), _judge(collectives.ranks, timeout), timeout))
    if "error" in verdict or loaded is None:
        # If one is absent, rank 0 ends all after it has said so. Of different exit codes Hydra gives any.
        if collectives.rank or verdict["all"]:
            collectives.close()
        if collectives.rank:
            sys.exit(1)
        raise EngineError(**verdict["error"])
    loaded[2].join(collectives)
    if collectives.rank:
        serve(loaded[2], collectives)
        sys.exit(0)
    spans = [(first, count) for first, count in verdict["spans"]]
    return loaded[0], loaded[1], RankedExecutor(loaded[2], collectives, spans, verdict["blocks"])


def _judge(count: int, timeout: float) -> Callable[[dict[int, bytes]], bytes]:
    def judge(said: dict[int, bytes]) -> bytes:
        words = {rank: json.loads(text) for rank, text in said.items()}
        verdict = {"all": len(words) == count}
        try:
            return json.dumps(verdict | _agreement(words, count, timeout)).encode()
        except EngineError as error:
            return json.dumps(verdict | {"error": _fields(error)}).encode()

    return judge


def _agreement(words: dict[int, dict[str, Any]], count: int, timeout: float) -> dict[str, Any]:
    """What ranks have together; raises `EngineError` for the first thing that does not fit."""
    for rank in sorted(words):
        if "error" in words[rank]:
            raise EngineError(**words[rank]["error"])
    absent = [rank for rank in range(count) if rank not in words]
    if absent:
        names = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        remedy = "look at what holds it up, or give it more time with --rank-timeout"
        raise EngineError("ranks", f"{names} did not get ready", found=f"nothing within {timeout:g} s", remedy=remedy)
    for rank in range(1, count):
        for what in ("digest", "vocabulary", "sums"):
            if words[rank][what] != words[0][what]:
                found, expected = (f"{what} {str(words[i][what])[:16]} on rank {i}" for i in (rank, 0))
                remedy = "give all ranks copies of the same engine"
                raise EngineError("ranks", "they have different engines", found=found, expected=expected, remedy=remedy)
    spans, end = [words[rank]["span"] for rank in range(count)], 0
    for first, size in spans:
        if first != end:
            raise EngineError("ranks", "parts of the vocabulary", found=f"one from {first} on", expected=f"one from {end} on")
        end += size
    if end != words[0]["vocabulary"]:
        raise EngineError("ranks", "parts of the vocabulary", found=f"{end} tokens", expected=str(words[0]["vocabulary"]))
    return {"spans": spans, "blocks": min(word["blocks"] for word in words.values())}


def _fields(error: BelleError) -> dict[str, str]:
    return {name: getattr(error, name) for name in ("stage", "what", "found", "expected", "remedy", "node")}


def _exit() -> None:
    """The launcher ends the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
