"""The CUDA executor's device, choices and refusals, with a driver that is made up; tests/parity runs engines."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime.adapters.factors import Factors, write_slot
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import cuda, cuda_adapters, cuda_device
from belle_compile.runtime.executors.choices import Choices, measure
from belle_compile.runtime.executors.cuda_device import CudaDevice
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.host import GPU_RESERVE_BYTES
from belle_compile.runtime.program import AdapterLayout, Call, FusionCalls, Input, KVLayout, Launch, Logits, Program
from belle_compile.runtime.program_json import program_to_json

LAUNCH = Launch("symbol", 64, 60_000, (3, 2, 1), 16, 40, 0, ("IMMA",))


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Pointer:
    """Of the device, as the bindings give it: no number, but it has one."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __int__(self) -> int:
        return self.address


class Driver:
    """Remembers calls; memory is the host's. `capability`, `version` and `count` are the GPU's and the host's."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=77,
    )  # fmt: skip
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUlaunchAttribute = CUlaunchAttributeValue = CUlaunchConfig = SimpleNamespace
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9,
    )  # fmt: skip

    def __init__(
        self, capability: tuple[int, int] = (9, 0), version: int = 13_000, count: int = 1, free: int = 1 << 30
    ) -> None:
        self.capability, self.version, self.count, self.free = capability, version, count, free
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.memory: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            given = {
                "cuDriverGetVersion": self.version, "cuDeviceGetCount": self.count, "cuDeviceGetName": b"NVIDIA Fake\0\0",
                "cuGetErrorString": b"out of memory", "cuEventElapsedTime": 0.5,
            }.get(name)  # fmt: skip
            if name == "cuDeviceGetAttribute":
                given = (*self.capability, 100 << 10)[arguments[0] - 75]
            if name in ("cuMemAlloc", "cuMemHostAlloc"):
                if name == "cuMemAlloc" and arguments[0] > self.free:
                    return Result.CUDA_ERROR_OUT_OF_MEMORY, None
                block = np.full(arguments[0], 9, np.uint8)
                self.memory[block.ctypes.data] = block
                given = Pointer(block.ctypes.data) if name == "cuMemAlloc" else block.ctypes.data
            if name == "cuMemGetInfo":
                return Result.CUDA_SUCCESS, self.free, 2 * self.free
            return (
                (Result.CUDA_SUCCESS,)
                if given is None and name.startswith(("cuCtx", "cuLaunch"))
                else (Result.CUDA_SUCCESS, given)
            )

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def test_a_host_without_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda_device.ctypes, "CDLL", missing)
    with pytest.raises(
        EngineError, match=r"^cuda: no NVIDIA driver on this host: found no libcuda\.so\.1; install NVIDIA's driver"
    ):
        cuda_device.open_device()


def test_the_device_says_what_it_is() -> None:
    device = CudaDevice(Driver((8, 6)), 0)
    assert (device.name, device.arch, device.memory_bytes) == ("NVIDIA Fake", "sm_86", 1 << 30)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (Driver(version=12_020), r"NVIDIA driver: found CUDA 12\.2, expected CUDA 12\.8 or newer; update the driver"),
        (Driver(count=0), r"GPU: found 0 on this host, expected number 0"),
    ],
)
def test_what_does_not_fit_is_named(driver: Driver, message: str) -> None:
    with pytest.raises(EngineError, match=f"^cuda: {message}"):
        CudaDevice(driver, 0)


def test_too_little_memory_says_how_much_there_is() -> None:
    device = CudaDevice(Driver(free=1 << 20), 0)
    message = r"^cuda: memory of NVIDIA Fake for weights: found 0\.00 GiB free, expected 1\.00 GiB; load with less memory"
    with pytest.raises(EngineError, match=message):
        device.allocate(1 << 30, "weights")


def test_kernels_are_started_with_two_null_pointers_behind_their_own() -> None:
    driver = Driver()
    device = CudaDevice(driver, 0)
    function = device.load("kernel", b"code", LAUNCH)
    device.launch(function, LAUNCH, 33, [10, 20])
    ((config, _, (values, types), _),) = driver.named("cuLaunchKernelEx")
    assert (config.gridDimX, config.gridDimY, config.gridDimZ, config.sharedMemBytes) == (3 * 3, 2, 1, 60_000)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (64, 1, 1)
    assert values == (10, 20, 0, 0) and len(types) == 4
    assert driver.named("cuFuncSetAttribute")[0][1:] == (8, 60_000), "more shared memory than is given unasked"
    for small in (LAUNCH, replace(LAUNCH, shared=64, rows=1, tensor_cores=())):
        device.load("kernel", b"code", small)
    assert [arguments[1:] for arguments in driver.named("cuFuncSetAttribute")[1:]] == [(8, 60_000), (9, 0)]


def test_a_kernel_that_may_overlap_does_so_behind_another_kernel_only() -> None:
    driver = Driver()
    device = CudaDevice(driver, 0)
    pinned, ahead = device.host_memory(64), replace(LAUNCH, overlap=True)
    function = device.load("kernel", b"code", LAUNCH)
    for launch in (ahead, ahead, LAUNCH, ahead):
        device.launch(function, launch, 1, [10])
    device.upload(5000, pinned)
    device.launch(function, ahead, 1, [10])
    numbers = [getattr(config, "numAttrs", 0) for config, *_ in driver.named("cuLaunchKernelEx")]
    assert numbers == [0, 1, 0, 1, 0]
    (attribute,) = driver.named("cuLaunchKernelEx")[1][0].attrs
    assert (attribute.id, attribute.value.programmaticStreamSerializationAllowed) == (6, 1)


def test_copies_are_timed_at_several_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_COPIED", 4096)
    monkeypatch.setattr(cuda_device, "_DISTANCES", (0, 64))
    driver = Driver()
    device = CudaDevice(driver, 0)
    assert device.copy_bandwidth() == 2 * 4096 / 0.5e-3
    (memory,) = driver.named("cuMemFree")[0]
    assert {target - memory for target, *_ in driver.named("cuMemcpyDtoDAsync")} == {4096, 4160}
    assert all(arguments[1:3] == (memory, 4096) for arguments in driver.named("cuMemcpyDtoDAsync"))


def test_blocks_are_copied_on_the_stream_and_no_kernel_overlaps_with_that() -> None:
    driver = Driver()
    device = CudaDevice(driver, 0)
    function, ahead = device.load("kernel", b"code", LAUNCH), replace(LAUNCH, overlap=True)
    device.launch(function, ahead, 1, [10])
    device.copy(5000, 9000, 256)
    device.launch(function, ahead, 1, [10])
    assert driver.named("cuMemcpyDtoDAsync") == [(5000, 9000, 256, None)]
    assert [getattr(config, "numAttrs", 0) for config, *_ in driver.named("cuLaunchKernelEx")] == [0, 0]


def test_weights_pass_through_pinned_memory_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_STAGING", 100)
    driver = Driver()
    device = CudaDevice(driver, 0)
    pinned = device.host_memory(64)
    assert not pinned.any()
    device.upload(5000, pinned[8:24])
    assert driver.named("cuMemcpyHtoDAsync") == [(5000, pinned.ctypes.data + 8, 16, None)]
    source = np.arange(250, dtype=np.uint8)
    copied: list[bytes] = []
    copy = driver.__getattr__("cuMemcpyHtoDAsync")

    def record(target: int, address: int, size: int, stream: Any) -> Any:
        block = next(b for start, b in driver.memory.items() if start <= address < start + len(b))
        copied.append(block[:size].tobytes())
        return copy(target, address, size, stream)

    driver.cuMemcpyHtoDAsync = record  # type: ignore[attr-defined]
    device.upload(9000, source)
    assert b"".join(copied) == source.tobytes()
    assert [arguments[0] for arguments in driver.named("cuMemcpyHtoDAsync")[1:]] == [9000, 9100, 9200]
    assert len(driver.named("cuMemFreeHost")) == 2, "the two that it passed through"
    device.close()
    assert len(driver.named("cuMemFreeHost")) == 3


def test_adapters_are_copied_in_pieces_each_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_adapters, "_PIECE", 1000)
    driver = Driver()
    layout = AdapterLayout.of(4, {"one": (40, 20, "float16"), "two": (20, 30, "float32")})
    slots = cuda_adapters.DeviceAdapterMemory(layout, 3, CudaDevice(driver, 0))
    copied, steps = bytearray(layout.slot_bytes), []
    change = Factors(*(np.ones(shape, np.float32) for shape in ((3, 20), 3, (30, 3))))

    def between(copy: Any) -> None:
        driver.calls.clear()
        copy()
        ((target, address, size, _),) = driver.named("cuMemcpyHtoDAsync")
        block = next(block for start, block in driver.memory.items() if start == address)
        start = target - slots.address("one") - 2 * layout.slot_bytes
        copied[start : start + size] = block[:size].tobytes()
        steps.append((start, size, driver.calls[-1][0]))

    slots.write(2, {"two": change}, between)
    assert [start for start, _, _ in steps] == [*range(0, layout.slot_bytes, 1000)]
    assert max(size for _, size, _ in steps) == 1000 and {last for *_, last in steps} == {"cuStreamSynchronize"}
    expected = np.zeros(layout.slot_bytes, np.uint8)
    write_slot(layout, expected, {"two": change})
    assert copied == expected.tobytes()
    assert slots.targets(frozenset({2})) == {"two"} and slots.targets(frozenset({0})) == frozenset()
    assert slots.address("two") - slots.address("one") == layout.regions["two"].offset


@pytest.mark.parametrize(
    ("carried", "own", "chosen"),
    [(("sm_80",), "sm_80", "sm_80"), (("sm_80",), "sm_89", "sm_80"), (("sm_80", "sm_86"), "sm_86", "sm_86")],
)
def test_code_for_an_older_gpu_of_the_same_major_version_runs(carried: tuple[str, ...], own: str, chosen: str) -> None:
    assert cuda.choose_arch(carried, SimpleNamespace(arch=own, name="GPU")) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(("carried", "own"), [("sm_80", "sm_90"), ("sm_89", "sm_80"), ("sm_90", "sm_100")])
def test_code_for_another_gpu_is_refused(carried: str, own: str) -> None:
    message = rf"^cuda: kernels for GPU: found {carried}, expected code for {own}; rebuild the engine for this GPU"
    with pytest.raises(EngineError, match=message):
        cuda.choose_arch((carried,), SimpleNamespace(arch=own, name="GPU"))  # type: ignore[arg-type]


def program(alternatives: dict[str, dict[str, tuple[str, ...]]]) -> Program:
    calls = (
        Call("qlinear", "a", "T", (Input("T"),), variants=((1, "one"), (None, "many"))),
        Call("qlinear", "b", "R", (Input("R"),), variants=((1, "one"), (None, "many"))),
    )
    launches = dict.fromkeys(("one", "many", "other", "wide"), LAUNCH)
    return Program(64, 8, 4, 4, 4096, 64, Logits(0, 64, 0, 64), KVLayout(1, 1, 8, "float16"), calls, FusionCalls(2, 2),
                   launches=launches, alternatives=alternatives)  # fmt: skip


def test_the_cache_is_what_is_asked_for_or_what_is_left() -> None:
    made = program({})
    block, others = made.kv.block_bytes, 1000 + made.arena_bytes + made.scratch_bytes + GPU_RESERVE_BYTES

    def blocks(free_blocks: int, asked: KvMemory) -> int:
        device = SimpleNamespace(memory_bytes=others + free_blocks * block, name="GPU")
        return cuda.kv_blocks(made, asked, 1000, device)  # type: ignore[arg-type]

    assert [blocks(free, KvMemory()) for free in (1, 9, 100)] == [1, 9, 16], "no more than 4 sequences of 4 blocks need"
    assert blocks(100, KvMemory(share=0.5)) == 50 and blocks(100, KvMemory(size=7 * block)) == 7 == blocks(100, KvMemory(100))
    beside = r"beside weights \(0\.00 GiB\) and activations \(0\.00 GiB\) on GPU; ask for another size"
    refused = [
        (0, KvMemory(), "kv_tokens: found 16 tokens"),
        (9, KvMemory(145), "kv_tokens: found 145 tokens"),
        (9, KvMemory(size=10 * block), "kv_cache_memory: found"),
        (9, KvMemory(share=0.1), "kv_cache_memory: found a share of 0.1"),
    ]
    for free, asked, option in refused:
        with pytest.raises(EngineError, match=f"^cuda: {option}.*{beside}"):
            blocks(free, asked)


class Timed:
    """A device whose kernels take the time that is given; a step is what it starts."""

    name = "NVIDIA Fake 80GB"

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.started, self.counts = seconds, [], []  # type: ignore[var-annotated]

    def record(self, run: Any) -> list[Any]:
        self.started = []
        run()
        return list(self.started)

    def forget(self, recorded: list[Any]) -> None:
        recorded.clear()

    def replay(self, recorded: list[Any]) -> None:
        self.now = sum(self.seconds[name] * rows for name, rows in recorded)

    def times(self, run: Any) -> list[float]:
        moments: list[float] = []
        run(lambda: moments.append(getattr(self, "now", 0.0)))
        return moments[1:]

    def launch(self, call: Call, name: str, rows: int) -> None:
        self.started.append((name, rows))


def test_the_fastest_kernel_is_chosen_once(tmp_path: Path) -> None:
    made = program({"one": {"1": ("other",)}, "many": {"any": ("wide", "other")}})
    (tmp_path / "program.json").write_text(program_to_json(made))
    device = Timed({"one": 3.0, "other": 2.0, "many": 1.0, "wide": 1.5})
    choices = Choices(tmp_path, device)  # type: ignore[arg-type]
    assert not choices.known(made) and choices.best("one", 1) == "one"
    measure(choices, made, device, made.launches, device.launch, lambda when, rows: device.counts.append((when, rows)))  # type: ignore[arg-type]
    assert (choices.best("one", 1), choices.best("many", None), choices.best("other", 4)) == ("other", "many", "other")
    assert device.counts == [("always", 64), ("always", 1)]
    again = Choices(tmp_path, device)  # type: ignore[arg-type]
    assert again.digest == choices.digest
    assert again.known(made) and again.chosen == choices.chosen
    measure(again, made, device, made.launches, device.launch, lambda *counts: pytest.fail("measured again"))  # type: ignore[arg-type]
    (file,) = tmp_path.glob("choices-*.json")
    assert file.name == "choices-nvidia-fake-80gb.json"
    for change in ({"program": "other"}, {"choices": {"one 1": "wide"}}, {"choices": {"one 1": "one"}}, {"choices": 3},
                   {"choices_format": 2}):  # fmt: skip
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        changed = Choices(tmp_path, device)  # type: ignore[arg-type]
        assert not changed.known(made) and changed.digest != choices.digest, change
    file.write_text("[]")
    assert not Choices(tmp_path, device).known(made)  # type: ignore[arg-type]


def test_tokens_that_are_alone_are_no_more_than_sequences(tmp_path: Path) -> None:
    made = program({"one": {"1": ("other",)}, "many": {"any": ("wide",)}})
    made = replace(made, calls=tuple(replace(call, when="alone") for call in made.calls))
    (tmp_path / "program.json").write_text(program_to_json(made))
    device = Timed(dict.fromkeys(made.launches, 1.0))
    measure(Choices(tmp_path, device), made, device, made.launches, device.launch, lambda *given: device.counts.append(given))  # type: ignore[arg-type]
    assert device.counts == [("alone", 4), ("alone", 1)], "4 sequences, of 64 tokens"


def test_a_directory_that_cannot_be_written_to_is_no_obstacle(tmp_path: Path) -> None:
    made = program({"one": {"1": ("other",)}})
    (tmp_path / "program.json").write_text(program_to_json(made))
    device = Timed(dict.fromkeys(("one", "other", "many"), 1.0))
    choices = Choices(tmp_path, device)  # type: ignore[arg-type]
    choices._path = tmp_path / "none" / "choices.json"
    measure(choices, made, device, made.launches, device.launch, lambda *counts: None)  # type: ignore[arg-type]
    assert choices.known(made) and not list(tmp_path.glob("choices-*"))
