"""The choice among the libraries that build plans, and what this host must have for it."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.base import LibraryChoice
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.tensorrt_library import LIBRARIES, STAGE, Library, numbers


@dataclass(frozen=True)
class Builder:
    """A library that is installed, and how it builds plans."""

    library: Library
    version: str
    choice: LibraryChoice


def builder_for(arch: str, choice: LibraryChoice) -> Builder:
    """The library that builds plans for a GPU's architecture ("sm_80"): the one that is chosen, else the one that is installed.

    Raises CompileError where there is none or where both are and none is chosen, for a version that is too old, and for what
    the library cannot do.
    """
    library = _named(arch, choice.name) if choice.name else _installed(arch)
    version = library.package.installed()
    if version is None:
        raise CompileError(STAGE, f"the Python package {library.name} is not installed", remedy=library.get)
    if numbers(version)[:2] < library.oldest:
        expected = f"{'.'.join(map(str, library.oldest))} or later"
        raise CompileError(STAGE, f"{library.title} is too old", found=version, expected=expected, remedy=library.get)
    if choice.version_compatible and library.lean is None:
        found, remedy = f"{library.name}, which has no lean runtime", "leave out --version-compatible"
        raise CompileError(STAGE, "a plan for later versions too", found=found, expected=_lean(), remedy=remedy)
    if choice.timing_cache and library.ahead_of_time:
        found, remedy = f"{library.name}, which measures no kernels in builds", "leave out --timing-cache: builds are the same"
        raise CompileError(STAGE, "a cache of measured kernels", found=found, remedy=remedy)
    return Builder(library, version, choice)


def check_gpu(library: Library, arch: str) -> None:
    """Raise CompileError where a library needs a GPU of the architecture to build for it, and this host has none."""
    if library.ahead_of_time:
        return
    from belle_compile.runtime.executors.cuda_device import open_device

    what = f"{library.title} builds plans on the kind of GPU that they are for"
    others = [other.name for other in LIBRARIES.values() if other.ahead_of_time and arch in other.archs]
    remedy = "build on a host that has one" + (f", or anywhere with --library {' or '.join(others)}" if others else "")
    try:
        device = open_device()
    except EngineError as error:
        found = error.what + (f" ({error.found})" if error.found else "")
        raise CompileError(STAGE, what, found=found, expected=f"a GPU with {arch}", remedy=remedy) from None
    found = device.arch
    name = device.name
    device.close()
    if found != arch:
        raise CompileError(STAGE, what, found=f"{name} ({found})", expected=f"a GPU with {arch}", remedy=remedy)


def _named(arch: str, name: str) -> Library:
    library = LIBRARIES.get(name)
    if library is None:
        raise CompileError(STAGE, "library", found=name, expected=" or ".join(LIBRARIES))
    if arch not in library.archs:
        others = [other.name for other in LIBRARIES.values() if arch in other.archs]
        expected, remedy = ", ".join(library.archs), f"use --library {' or '.join(others)}"
        raise CompileError(STAGE, f"{library.title} makes no plans for this GPU", found=arch, expected=expected, remedy=remedy)
    return library


def _installed(arch: str) -> Library:
    """The library that is installed and knows an architecture; where none is, the first one that would."""
    known = [library for library in LIBRARIES.values() if arch in library.archs]
    present = [library for library in known if library.package.installed()]
    if len(present) > 1:
        found = " and ".join(f"{library.name} {library.package.installed()}" for library in present)
        remedy = f"choose one with --library {' or '.join(library.name for library in present)}"
        raise CompileError(STAGE, f"two libraries can build plans for {arch}", found=found, remedy=remedy)
    return (present or known)[0]


def _lean() -> str:
    return " or ".join(f"{library.name}, which has one" for library in LIBRARIES.values() if library.lean)
