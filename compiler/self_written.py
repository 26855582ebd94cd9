"""Calibration by requests that the model writes itself: the user's choice, and when a build makes it without being asked.

This module imports nothing that the command line does not need at every start; `compiler.request_writer` writes the requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.units import duration

SELF = "self"  # in place of a file of requests
DEFAULT_WITHIN_S = 120.0  # a build without requests calibrates itself where that is estimated to take at most so long
LEAST_PARAMETERS = 20_000_000  # smaller models are built in seconds, and hardly write text

# The estimate, from builds of SmolLM2-135M on two cores of an AMD EPYC (Zen 5): seconds on one core for the engine that writes,
# and core-seconds for each parameter and each token of the requests.
_KERNELS_S = 30.0
_CORE_S = 4.5e-11
_TOKENS_A_REQUEST = 200


@dataclass(frozen=True)
class SelfWritten:
    """Requests that the model writes itself: `size` to calibrate with, and `holdout` for the accuracy gate. The same `seed`
    gives the same requests.

    With `within_s`, it is a default that nobody chose: the build then calibrates only where that is estimated to take at most
    so many seconds, and a limit of the gate that the engine misses is shown in the report and ends no build.
    """

    size: int = 64
    holdout: int = 16
    seed: int = 0
    within_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "holdout"):
            if (value := getattr(self, name)) < 1:
                raise CompileError("calibration", f"{name} of self-written requests", found=str(value), expected="1 or more")
        if self.seed < 0:
            raise CompileError("calibration", "seed of self-written requests", found=str(self.seed), expected="0 or more")

    @property
    def by_default(self) -> bool:
        """Whether nobody asked for these requests."""
        return self.within_s is not None

    def estimated_s(self, parameters: int, cores: int) -> float:
        """The seconds that writing the requests, calibrating with them and judging the engine take on this host."""
        tokens = (self.size + self.holdout) * _TOKENS_A_REQUEST
        return _KERNELS_S + _CORE_S * parameters * tokens / cores

    def reason_against(self, parameters: int, cores: int) -> str:
        """Why a build without requests is not calibrated by itself, as a phrase; empty where it is."""
        if self.within_s is None:
            return ""
        size = f"{parameters / 1e6:,.1f} M parameters"
        if parameters < LEAST_PARAMETERS:
            return f"a model of {size} is built without calibration unless --calibration names requests or {SELF}"
        if (estimated := self.estimated_s(parameters, cores)) > self.within_s:
            return (
                f"calibration by requests of its own is estimated to take {duration(estimated)} for {size} on {cores} cores, "
                f"more than {duration(self.within_s)}; ask for it with --calibration {SELF}"
            )
        return ""

    def reason_for(self, parameters: int, cores: int) -> str:
        """Why the build writes requests, as a sentence for the progress."""
        estimated = duration(self.estimated_s(parameters, cores))
        how = "no requests were given" if self.by_default else f"--calibration {SELF}"
        off = "; --no-calibration leaves that out" if self.by_default else ""
        return f"{how}: the model writes its own and is calibrated by them, which is estimated to take {estimated}{off}"
