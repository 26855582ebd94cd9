"""The limits of processors and memory that control groups set: those of containers, of Kubernetes' pods and of systemd's units.

Groups are nested, and each limits those below it, so that the least limit on the way up counts. Both versions of the interface
are read; see cgroups(7), and proc(5) for the files in /proc.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PROCESS = Path("/proc/self")

_UNLIMITED = 1 << 62  # version 1 writes about 2^63 for no limit
_ESCAPE = re.compile(r"\\([0-7]{3})")


class _Group(NamedTuple):
    """A directory of a control group, and the version of its interface."""

    directory: Path
    version: int


def processors() -> float | None:
    """The number of processors whose time this process may use; None without a limit. It need not be whole."""
    shares = []
    for directory, version in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file where the controller is off, or no number: "max"
            if version == 2:
                quota, period = map(int, (directory / "cpu.max").read_text().split())
            else:
                quota, period = (int((directory / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:
                shares.append(quota / period)
    return min(shares, default=None)


def memory_bytes() -> int | None:
    """The memory that this process may use; None without a limit."""
    limits = []
    for directory, version in _groups("memory"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((directory / ("memory.max" if version == 2 else "memory.limit_in_bytes")).read_text()))
        if version == 1:  # which knows the limits of groups above, also of those that are not mounted here
            with contextlib.suppress(OSError, ValueError):
                statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                limits.append(int(statistics.get("hierarchical_memory_limit", _UNLIMITED)))
    return min((limit for limit in limits if 0 < limit < _UNLIMITED), default=None)


def _groups(controller: str) -> Iterator[_Group]:
    """Yield the groups that limit this process, as far as they are mounted: from its own one upwards."""
    paths = _own_paths()
    for root, mount, kind, options in _mounts():
        if kind == "cgroup2":
            version, path = 2, paths.get("")
        elif kind == "cgroup" and controller in options:
            version, path = 1, paths.get(controller)
        else:
            continue
        if path is None:
            continue
        below = PurePosixPath(path)
        # A path that is not below the mount's root is that of another name space; then the mount's root is all that is known.
        inside = below.is_relative_to(root) and ".." not in below.parts
        directory = mount / below.relative_to(root) if inside else mount
        while True:
            yield _Group(directory, version)
            if directory == mount:
                break
            directory = directory.parent


def _own_paths() -> dict[str, str]:
    """The path of this process's group for each controller of version 1; for version 2, under the name ""."""
    paths: dict[str, str] = {}
    for line in _lines(PROCESS / "cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        paths |= dict.fromkeys(controllers.split(","), path or "/")
    return paths


def _mounts() -> Iterator[tuple[str, Path, str, list[str]]]:
    """Yield root, mount point, type and the options of the file system of each mount."""
    for line in _lines(PROCESS / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(kind) >= 3:
            root, mount = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
            yield root, Path(mount), kind[0], kind[2].split(",")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no Linux, or no /proc
        return []
