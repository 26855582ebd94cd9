"""Engines for processors: kernel libraries for several instruction sets, of which the host has at least one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from belle_compile.runtime import host
from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, cannot_run, check_machine, check_memory

_log = logging.getLogger(__name__)


class CpuFactory(ExecutorFactory):
    """Loads `CpuExecutor`s."""

    isas = tuple(host.ISA_FLAGS)

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Check the machine, its instruction sets and its memory."""
        check_machine(target)
        required, offered = target.requires.isa, host.host_isas()
        if not set(offered) & set(required):
            missing = "; ".join(f"{isa} lacks {', '.join(host.missing_flags(isa))}" for isa in required)
            found = f"instruction sets {', '.join(offered) or 'none known'} ({missing})"
            remedy = "run it on a newer CPU or rebuild it for this one"
            raise cannot_run(target, found, f"one of {', '.join(required)}", remedy)
        check_memory(target, ranks_here, held_bytes)

    def usable_isas(self, target: TargetInfo) -> Sequence[str]:
        """The instruction sets that processor and engine have in common, best first."""
        return [isa for isa in host.host_isas() if isa in target.isas]

    def load(self, request: LoadRequest) -> Executor:
        """Map the weights and load the kernels. By default ranks that may run on the same cores share these evenly."""
        from belle_compile.runtime.executors.cpu import CpuExecutor

        threads, cores = request.threads, len(host.usable_cores())
        sharing = request.collectives.sharing if request.collectives else 1
        if threads is None:
            threads = max(1, cores // sharing)
        elif threads * sharing > cores and not (request.collectives and request.collectives.rank):
            asked = f"{threads} threads" + (f" in each of {sharing} ranks" if sharing > 1 else "")
            most = max(1, cores // sharing)
            _log.warning("%s share %d usable cores and will wait for each other; at most %d are faster", asked, cores, most)
        return CpuExecutor(
            request.directory, request.manifest.target.isas, threads=threads, isa=request.isa, kv_memory=request.kv_memory,
            collectives=request.collectives, adapter_slots=request.adapter_slots, beside=request.beside,
        )  # fmt: skip
