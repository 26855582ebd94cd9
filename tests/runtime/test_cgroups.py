"""Limits of control groups, read from trees of /proc and /sys that a container, a pod or a unit would see."""

from __future__ import annotations

from pathlib import Path

import pytest

from belle_compile.runtime import cgroups, host

MIB = 1 << 20
V1_NONE = 9223372036854771712


class Tree:
    """Files of /proc/self and of mounted control groups under one directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mounted, self._process = root / "sys" / "fs" / "cgroup", root / "proc"
        self._process.mkdir()
        monkeypatch.setattr(cgroups, "PROCESS", self._process)

    def process(self, cgroup: str, *mounts: str) -> None:
        """`mounts` are "ROOT WHERE TYPE OPTIONS" with WHERE below /sys/fs/cgroup."""
        (self._process / "cgroup").write_text(cgroup)
        lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,memory,cpu"]
        for number, mount in enumerate(mounts):
            root, where, kind, options = mount.split(" ")
            point = str(self.mounted / where.lstrip("/")).replace(" ", "\\040")
            lines.append(f"{31 + number} 22 0:{29 + number} {root} {point} rw,nosuid shared:9 - {kind} {kind} rw,{options}")
        (self._process / "mountinfo").write_text("\n".join(lines) + "\n")

    def write(self, name: str, text: object) -> None:
        path = self.mounted / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


UNIFIED = "/ / cgroup2 nsdelegate"


def test_a_container_with_a_name_space_of_its_own(tree: Tree) -> None:
    tree.process("0::/\n", UNIFIED)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (None, None)
    tree.write("cpu.max", "max 100000")
    tree.write("memory.max", "max")
    assert (cgroups.processors(), cgroups.memory_bytes()) == (None, None)
    tree.write("cpu.max", "150000 100000")
    tree.write("memory.max", 512 * MIB)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (1.5, 512 * MIB)
    assert host.memory_bytes() == 512 * MIB


@pytest.mark.parametrize(
    ("limits", "processors", "memory"),
    [
        ({"/kube.slice/pod.slice/cpu.max": "200000 100000", "/kube.slice/memory.max": 8 * MIB}, 2.0, 8 * MIB),
        ({"/kube.slice/cpu.max": "50000 100000", "/kube.slice/pod.slice/app.scope/cpu.max": "300000 100000"}, 0.5, None),
        ({"/kube.slice/pod.slice/app.scope/memory.max": 9 * MIB, "/memory.max": 4 * MIB, "/kube.slice/memory.max": "max"},
         None, 4 * MIB),
        ({"/other.slice/cpu.max": "1000 100000", "/other.slice/memory.max": MIB}, None, None),
        ({"/kube.slice/cpu.max": "wrong", "/kube.slice/pod.slice/cpu.max": "", "/kube.slice/memory.max": "-5"}, None, None),
    ],
)  # fmt: skip
def test_nested_groups_of_version_2(
    tree: Tree, limits: dict[str, object], processors: float | None, memory: int | None
) -> None:
    tree.process("0::/kube.slice/pod.slice/app.scope\n", UNIFIED)
    for name, text in limits.items():
        tree.write(name.lstrip("/"), text)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (processors, memory)


V1 = (
    "/ cpu,cpuacct cgroup cpu,cpuacct",
    "/ memory cgroup memory",
    "/ systemd cgroup name=systemd",
    "/ unified cgroup2 nsdelegate",
)


@pytest.mark.parametrize(
    ("limits", "processors", "memory"),
    [
        ({"cpu,cpuacct/docker/a/cpu.cfs_quota_us": 250000, "cpu,cpuacct/docker/a/cpu.cfs_period_us": 100000}, 2.5, None),
        ({"cpu,cpuacct/docker/a/cpu.cfs_quota_us": -1, "cpu,cpuacct/docker/a/cpu.cfs_period_us": 100000,
          "cpu,cpuacct/docker/cpu.cfs_quota_us": 50000, "cpu,cpuacct/docker/cpu.cfs_period_us": 50000}, 1.0, None),
        ({"memory/docker/a/memory.limit_in_bytes": V1_NONE, "memory/memory.limit_in_bytes": V1_NONE}, None, None),
        ({"memory/docker/a/memory.limit_in_bytes": V1_NONE, "memory/docker/memory.limit_in_bytes": 6 * MIB}, None, 6 * MIB),
        ({"memory/docker/a/memory.limit_in_bytes": 8 * MIB,
          "memory/docker/a/memory.stat": f"cache 5\nhierarchical_memory_limit {3 * MIB}\nhierarchical_memsw_limit {V1_NONE}"},
         None, 3 * MIB),
        ({"cpu,cpuacct/docker/a/cpu.cfs_quota_us": 5, "cpu,cpuacct/docker/a/cpu.cfs_period_us": 0}, None, None),
    ],
)  # fmt: skip
def test_nested_groups_of_version_1(
    tree: Tree, limits: dict[str, object], processors: float | None, memory: int | None
) -> None:
    tree.process("5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/docker/a\n", *V1)
    for name, text in limits.items():
        tree.write(name, text)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (processors, memory)


@pytest.mark.parametrize("path", ["/docker/a", "/docker/a/inner", "/", "/elsewhere", "/../x"])
def test_a_container_that_sees_its_own_group_only(tree: Tree, path: str) -> None:
    """Without a name space of its own, its group is mounted as the root, while the path of its process is that on the host."""
    mounts = ("/docker/a cpu cgroup cpu", "/docker/a memory cgroup memory")
    tree.process(f"2:memory:{path}\n1:cpu:{path}\n", *mounts)
    tree.write("memory/memory.limit_in_bytes", 7 * MIB)
    tree.write("cpu/cpu.cfs_quota_us", 30000)
    tree.write("cpu/cpu.cfs_period_us", 100000)
    tree.write("memory/inner/memory.limit_in_bytes", 5 * MIB)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (0.3, (5 if path.endswith("inner") else 7) * MIB)


def test_controllers_of_both_versions(tree: Tree) -> None:
    tree.process("3:memory:/a\n0::/a\n", "/ memory cgroup memory", "/ unified cgroup2 rw")
    tree.write("memory/a/memory.limit_in_bytes", 3 * MIB)
    tree.write("unified/a/cpu.max", "400000 100000")
    assert (cgroups.processors(), cgroups.memory_bytes()) == (4.0, 3 * MIB)


def test_names_with_spaces_and_colons(tree: Tree) -> None:
    tree.process("0::/a b:c/d\n", "/ my\\040groups cgroup2 rw")
    tree.write("my groups/a b:c/memory.max", 2 * MIB)
    assert cgroups.memory_bytes() == 2 * MIB


@pytest.mark.parametrize("cgroup", ["", "0::/\n", "nonsense\n::\n", "1:cpu\n"])
def test_what_is_missing_or_nonsense_is_no_limit(tree: Tree, cgroup: str) -> None:
    assert (cgroups.processors(), cgroups.memory_bytes()) == (None, None)
    tree.process(cgroup)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (None, None)
    tree.process(cgroup, UNIFIED, *V1)
    assert (cgroups.processors(), cgroups.memory_bytes()) == (None, None)
