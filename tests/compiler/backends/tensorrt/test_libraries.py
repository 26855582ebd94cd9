"""The choice between TensorRT for RTX and TensorRT, of which the second one is a stand-in with its names and no kernels."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from belle_compile.compiler import inspection
from belle_compile.compiler.backends.base import LibraryChoice
from belle_compile.compiler.backends.tensorrt.build import plan_of, write_model
from belle_compile.compiler.backends.tensorrt.installed import builder_for
from belle_compile.compiler.backends.tensorrt.rules import translate
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import cuda_device, tensorrt_library
from belle_compile.runtime.executors.tensorrt_library import runtime_for
from belle_compile.runtime.executors.tensorrt_plan import PLAN_NAME, PROFILES, read_facts
from tests.compiler.backends.tensorrt.graphs import graph
from tests.parity.variants import VARIANTS
from tests.runtime.executors.tensorrt_host import HostDevice

STAND_IN = Path(__file__).parents[3] / "fixtures" / "tensorrt_stand_in"
RTX, ENTERPRISE, LEAN = "tensorrt-rtx", "tensorrt", "tensorrt-lean"


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let this host have these packages of TensorRT and no others; `_` stands for `-` in their names."""

    def version(package: str) -> str:
        try:
            return versions[package.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError from None

    monkeypatch.setattr(tensorrt_library, "version", version)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this host have TensorRT, which is the stand-in, and a GPU with sm_80."""
    install(monkeypatch, tensorrt="11.4.0.106")
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setattr(cuda_device, "open_device", HostDevice)


@pytest.mark.parametrize(
    ("versions", "arch", "choice", "expected"),
    [
        ({"tensorrt_rtx": "1.7.1"}, "sm_80", LibraryChoice(), RTX),
        ({"tensorrt": "11.4.0"}, "sm_80", LibraryChoice(), ENTERPRISE),
        ({"tensorrt_cu12": "11.4.0"}, "sm_80", LibraryChoice(version_compatible=True), ENTERPRISE),
        ({"tensorrt_rtx": "1.7.1", "tensorrt": "11.4.0"}, "sm_90", LibraryChoice(), ENTERPRISE),
        ({"tensorrt_rtx": "1.7.1", "tensorrt": "11.4.0"}, "sm_80", LibraryChoice(ENTERPRISE), ENTERPRISE),
        ({"tensorrt_rtx": "1.7.1", "tensorrt": "11.4.0"}, "sm_80", LibraryChoice(RTX), RTX),
    ],
)
def test_the_library_is_the_one_that_is_installed_or_chosen(
    versions: dict[str, str], arch: str, choice: LibraryChoice, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **versions)
    builder = builder_for(arch, choice)
    assert (builder.library.name, builder.version) == (expected, versions.get(expected.replace("-", "_"), "11.4.0"))


@pytest.mark.parametrize(
    ("versions", "arch", "choice", "message"),
    [
        ({}, "sm_80", LibraryChoice(), r"^tensorrt: the Python package tensorrt-rtx is not installed; pip install"),
        ({}, "sm_90", LibraryChoice(), r"^tensorrt: the Python package tensorrt is not installed; pip install 'tensorrt>=11"),
        ({"tensorrt_rtx": "1.7.1"}, "sm_80", LibraryChoice(ENTERPRISE), r"the Python package tensorrt is not installed; pip"),
        (
            {"tensorrt_rtx": "1.7.1", "tensorrt": "11.4.0"}, "sm_80", LibraryChoice(),
            r"^tensorrt: two libraries can build plans for sm_80: found tensorrt-rtx 1\.7\.1 and tensorrt 11\.4\.0; choose one "
            r"with --library tensorrt-rtx or tensorrt\.$",
        ),
        ({"tensorrt_rtx": "1.6.1.120"}, "sm_80", LibraryChoice(), r"for RTX is too old: found 1\.6\.1\.120, expected 1\.7 or"),
        ({"tensorrt": "10.16.0"}, "sm_80", LibraryChoice(), r"TensorRT is too old: found 10\.16\.0, expected 11\.0 or later"),
        (
            {"tensorrt_rtx": "1.7.1"}, "sm_90", LibraryChoice(RTX),
            r"makes no plans for this GPU: found sm_90, expected sm_75, .*; use --library tensorrt\.$",
        ),
        (
            {"tensorrt_rtx": "1.7.1"}, "sm_80", LibraryChoice(version_compatible=True),
            r"versions too: found tensorrt-rtx, which has no lean runtime, expected tensorrt, which has one; leave out",
        ),
        (
            {"tensorrt_rtx": "1.7.1"}, "sm_80", LibraryChoice(timing_cache=Path("times")),
            r"a cache of measured kernels: found tensorrt-rtx, which measures no kernels in builds; leave out --timing-cache",
        ),
        ({"tensorrt_rtx": "1.7.1"}, "sm_80", LibraryChoice("tensorflow"), r"library: found tensorflow, expected tensorrt-rtx"),
    ],
)  # fmt: skip
def test_a_library_that_cannot_build_is_refused(
    versions: dict[str, str], arch: str, choice: LibraryChoice, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **versions)
    with pytest.raises(CompileError, match=message):
        builder_for(arch, choice)


def test_tensorrt_asks_for_the_gpu_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    request = BuildRequest(tmp_path / "missing", tmp_path / "engine", "a100", "none", backend="tensorrt")
    with pytest.raises(CompileError) as refused:
        build(request)
    assert str(refused.value) == (
        "tensorrt: TensorRT builds plans on the kind of GPU that they are for: found no NVIDIA driver on this host (no "
        "libcuda.so.1), expected a GPU with sm_80; build on a host that has one, or anywhere with --library tensorrt-rtx."
    )
    monkeypatch.setattr(cuda_device, "open_device", HostDevice)
    with pytest.raises(CompileError, match=r"found a host \(sm_80\), expected a GPU with sm_90; build on a host that"):
        build(BuildRequest(tmp_path / "missing", tmp_path / "engine", "h100", "none", backend="tensorrt"))


def test_other_backends_have_no_libraries(tmp_path: Path) -> None:
    for choice in (LibraryChoice(RTX), LibraryChoice(version_compatible=True), LibraryChoice(timing_cache=tmp_path / "times")):
        with pytest.raises(
            CompileError, match=r"^backend: options of libraries for the backend tvm: .* for tensorrt; leave out"
        ):
            build(BuildRequest(tmp_path / "missing", tmp_path / "engine", library=choice))


@pytest.mark.usefixtures("gpu")
def test_an_engine_of_tensorrt(tmp_path: Path) -> None:
    checkpoint, times = VARIANTS["llama_theta"](tmp_path / "tiny"), tmp_path / "times"
    choice = LibraryChoice(version_compatible=True, timing_cache=times)
    request = BuildRequest(checkpoint, tmp_path / "engine", "a100", "none", backend="tensorrt", library=choice, drift=False)
    engine = build(request)
    facts, plan = read_facts(engine / "rank0"), json.loads((engine / "rank0" / PLAN_NAME).read_bytes())
    assert (facts.library, facts.version, facts.version_compatible, facts.arch) == (ENTERPRISE, "11.4.0.106", True, "sm_80")
    assert plan["flags"] == ["VERSION_COMPATIBLE"] and plan["compatibility"] == "SAME_COMPUTE_CAPABILITY"
    assert plan["network"] == 2 and len(plan["profiles"]) == len(PROFILES) and plan["cache"] == ""
    assert times.read_bytes() == b"measured times"
    found = inspection.inspect(engine)
    assert found["layers"] == {"answers and prompts": {"gemm": 2, "kgen": 1}}
    assert found["toolchain"][ENTERPRISE] == "11.4.0.106" and RTX not in found["toolchain"]


@pytest.mark.usefixtures("gpu")
def test_what_tensorrt_refuses_while_it_builds(tmp_path: Path) -> None:
    model = translate(graph("llama_theta", "none", tmp_path)[1], "float16", 128)
    folder, times = tmp_path / "model", tmp_path / "times"
    folder.mkdir()
    write_model(model, folder)
    times.write_bytes(b"another GPU's times")
    with pytest.raises(
        CompileError, match=r"^tensorrt: TensorRT refuses the graph: found .*times, a timing cache that does not"
    ):
        plan_of(folder, model, "sm_80", PROFILES, builder_for("sm_80", LibraryChoice(timing_cache=times)))
    (folder / "no-gpu").touch()
    with pytest.raises(CompileError, match=r"refuses the graph: found createInferBuilder: .*CUDA initialization failure\)\.$"):
        plan_of(folder, model, "sm_80", PROFILES, builder_for("sm_80", LibraryChoice()))


@pytest.mark.parametrize(
    ("versions", "built_with", "version_compatible", "expected"),
    [
        ({"tensorrt": "11.4.0"}, "11.4.0", False, ENTERPRISE),
        ({"tensorrt": "11.10.0"}, "11.9.0", True, ENTERPRISE),
        ({"tensorrt": "12.0.0"}, "11.4.0", True, ENTERPRISE),
        ({"tensorrt_lean": "11.4.0"}, "11.4.0", True, LEAN),
        ({"tensorrt": "11.3.0", "tensorrt_lean_cu13": "11.4.0"}, "11.4.0", True, LEAN),
    ],
)
def test_a_plan_runs_with_its_library(
    versions: dict[str, str], built_with: str, version_compatible: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **versions)
    assert runtime_for(ENTERPRISE, built_with, version_compatible).package.name == expected


@pytest.mark.parametrize(
    ("versions", "version_compatible", "message"),
    [
        (
            {"tensorrt_rtx": "1.7.1"}, False,
            r"^tensorrt: TensorRT, which built the plan, is not installed: found tensorrt-rtx 1\.7\.1, expected tensorrt "
            r"11\.4\.0; install the version that built the engine \(pip install .*\), or rebuild it with belle-compile",
        ),
        ({}, False, r"is not installed: expected tensorrt 11\.4\.0; install"),
        ({"tensorrt": "11.5.0"}, False, r"version of TensorRT: found tensorrt 11\.5\.0, expected tensorrt 11\.4\.0; install"),
        ({"tensorrt_lean": "11.4.0"}, False, r"is not installed: expected tensorrt 11\.4\.0; install"),
        (
            {"tensorrt": "11.3.9"}, True,
            r"found tensorrt 11\.3\.9, expected tensorrt 11\.4\.0 or tensorrt-lean 11\.4\.0, or a later version; install",
        ),
    ],
)  # fmt: skip
def test_a_plan_of_another_library_or_version_is_refused(
    versions: dict[str, str], version_compatible: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **versions)
    with pytest.raises(EngineError, match=message):
        runtime_for(ENTERPRISE, "11.4.0", version_compatible)


def test_a_library_that_is_unknown_is_refused() -> None:
    with pytest.raises(EngineError, match=r"library of the plan: found another, expected tensorrt-rtx or tensorrt; rebuild"):
        runtime_for("another", "1.0", False)
