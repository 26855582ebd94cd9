"""The libraries that build and run plans: TensorRT for RTX, and TensorRT, with what each of them can do.

A plan runs with the library that built it. TensorRT for RTX builds without a GPU and compiles kernels where an engine is
loaded; TensorRT measures kernels while it builds, on the kind of GPU that the plan is for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from belle_compile.runtime.errors import EngineError, install

STAGE = "tensorrt"


@dataclass(frozen=True)
class Package:
    """A Python module, and the distributions that may have brought it, of which the first one names it in messages."""

    module: str
    distributions: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.distributions[0]

    def installed(self) -> str | None:
        """The installed version; None where there is none."""
        for distribution in self.distributions:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return None


@dataclass(frozen=True)
class Library:
    """A library of plans, called `title` in messages. It is used from the version `oldest` on, and builds for GPUs of `archs`.

    `ahead_of_time`: it builds for each of them without a GPU; otherwise for the GPU of the host alone, whose kernels it
    measures. `lean` is the package of its lean runtime, a copy of which lies in plans that are version compatible: they run
    with later versions too, and with this package alone. None: there are no such plans. `get` is the command that installs the
    library.
    """

    title: str
    package: Package
    oldest: tuple[int, int]
    archs: tuple[str, ...]
    ahead_of_time: bool
    lean: Package | None
    get: str

    @property
    def name(self) -> str:
        return self.package.name


RTX = Library(
    "TensorRT for RTX", Package("tensorrt_rtx", ("tensorrt-rtx",)), (1, 7), ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120"),
    ahead_of_time=True, lean=None, get=install("tensorrt"),
)  # fmt: skip
ENTERPRISE = Library(
    "TensorRT", Package("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")), (11, 0),
    ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), ahead_of_time=False,
    lean=Package("tensorrt_lean", ("tensorrt-lean", "tensorrt-lean-cu13", "tensorrt-lean-cu12")),
    get="pip install 'tensorrt>=11' 'cuda-bindings>=12.8'",
)  # fmt: skip
LIBRARIES = {library.name: library for library in (RTX, ENTERPRISE)}
# The compute capabilities that one of the libraries makes plans for.
ARCHS = tuple(dict.fromkeys(arch for library in LIBRARIES.values() for arch in library.archs))


@dataclass(frozen=True)
class Installed:
    """A package of this host that can run a plan, with its version."""

    package: Package
    version: str


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version, which order versions."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:4])


def check_any_installed() -> None:
    """Raise `EngineError` where this host has no library that runs plans."""
    packages = [package for library in LIBRARIES.values() for package in (library.package, library.lean) if package]
    if not any(package.installed() for package in packages):
        gets = " or ".join(library.get for library in LIBRARIES.values())
        names = " or ".join(LIBRARIES)
        raise EngineError(STAGE, f"the Python package {names} is not installed", remedy=gets)


def runtime_for(name: str, built_with: str, version_compatible: bool) -> Installed:
    """The package that runs a plan which the library `name` built in the version `built_with`; raises `EngineError` where this
    host has none, or has another library or version."""
    library = LIBRARIES.get(name)
    if library is None:
        expected, remedy = " or ".join(LIBRARIES), "rebuild the engine with belle-compile build"
        raise EngineError(STAGE, "library of the plan", found=name, expected=expected, remedy=remedy)
    packages = [library.package, *([library.lean] if version_compatible and library.lean else [])]
    present = [Installed(package, found) for package in packages if (found := package.installed())]
    for candidate in present:
        later = version_compatible and numbers(candidate.version) >= numbers(built_with)
        if candidate.version == built_with or later:
            return candidate
    others = [Installed(other.package, other.package.installed() or "") for other in LIBRARIES.values() if other is not library]
    shown = present or [other for other in others if other.version]
    expected = " or ".join(f"{package.name} {built_with}" for package in packages)
    if version_compatible:
        expected += ", or a later version"
    what = "version of TensorRT" if present else f"{library.title}, which built the plan, is not installed"
    remedy = f"install the version that built the engine ({library.get}), or rebuild it with belle-compile build"
    raise EngineError(
        STAGE, what, found=" and ".join(f"{one.package.name} {one.version}" for one in shown), expected=expected, remedy=remedy
    )
