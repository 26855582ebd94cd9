"""Anonymous pages and mapped weights."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.memory import WeightsFile, anonymous, trim_heap


def write_weights(path: Path, tensors: dict[str, np.ndarray], align: int = 64) -> Path:
    """safetensors whose data begins at a multiple of `align` bytes."""
    names = {"float32": "F32", "int8": "I8", "uint8": "U8"}
    header, offset = {"__metadata__": {"format": "belle"}}, 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": span}  # type: ignore[assignment]
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return path


TENSORS = {"a": np.arange(32, dtype=np.float32), "b": np.arange(-64, 64, dtype=np.int8).reshape(2, 64)}


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    weights = WeightsFile(write_weights(tmp_path / "w", TENSORS))
    for name, tensor in TENSORS.items():
        assert weights.address(name) % 64 == 0 and weights.sizes[name] == tensor.nbytes
        assert ctypes.string_at(weights.address(name), tensor.nbytes) == tensor.tobytes()
    weights.require(["a", "b"], weights.header_digest)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    data = bytearray(numpy_io.save(TENSORS))
    (length,) = struct.unpack("<Q", data[:8])
    padding = -(8 + length) % 64
    data[:8] = struct.pack("<Q", length + padding)
    data[8 + length : 8 + length] = b" " * padding
    (tmp_path / "w").write_bytes(data)
    weights = WeightsFile(tmp_path / "w")
    assert ctypes.string_at(weights.address("b"), 128) == TENSORS["b"].tobytes()


def test_missing_tensor_and_file(tmp_path: Path) -> None:
    weights = WeightsFile(write_weights(tmp_path / "w", TENSORS))
    with pytest.raises(EngineError, match=r"tensors of .*w: found 2 missing, the first of them head; copy"):
        weights.require(["a", "tail", "head"], weights.header_digest)
    with pytest.raises(EngineError, match="none is missing; copy the engine again"):
        WeightsFile(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found cannot mmap an empty file"),
        (b"1234", "found 4 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "found a header of 1000 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "found a header that does not parse"),
        (struct.pack("<Q", 2) + b"{x", "found a header that does not parse"),
        (struct.pack("<Q", 24) + b'{"a": {"dtype": "F32"}  ', "found a header that does not parse"),
    ],
)
def test_damaged_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(EngineError, match=f"weights .*: {message}.*expected aligned safetensors; copy"):
        WeightsFile(tmp_path / "w")


def test_truncated_and_unaligned_tensors(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "w", TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="found 447 bytes, of which the header explains 448"):
        WeightsFile(path)
    odd = {"a": np.zeros(4, np.float32), **TENSORS}
    with pytest.raises(EngineError, match=r"found tensor \w at byte \d+, not a multiple of 64"):
        WeightsFile(write_weights(tmp_path / "odd", {"z": np.zeros(5, np.float32), **odd}))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda a, b: b.update(data_offsets=[192, 320]),
            "tensor b of 128 bytes at bytes 192 to 320, where byte 128",
        ),
        (lambda a, b: b.update(data_offsets=[64, 192]), "tensor b of 128 bytes at bytes 64 to 192, where byte 128 comes next"),
        (lambda a, b: b.update(shape=[1, 64]), "tensor b of 64 bytes at bytes 128 to 256"),
        (lambda a, b: b.update(shape=[-2, -64]), "a header that does not parse: shape"),
        (lambda a, b: b.update(dtype="I64"), "tensor b of 1024 bytes at bytes 128 to 256"),
        (lambda a, b: b.update(dtype="Q4"), "a header that does not parse: 'Q4'"),
        (lambda a, b: a.update(data_offsets=[0, 128.0]), "a header that does not parse"),
        (lambda a, b: b.update(data_offsets=[128, 256, 300]), "tensor b of 128 bytes at bytes 128 to 256 to 300"),
        (lambda a, b: a.update(shape=[1 << 70]), "tensor a of .* bytes"),
    ],
)
def test_headers_that_are_at_odds_with_themselves(tmp_path: Path, change: Callable[[Any, Any], None], found: str) -> None:
    data = write_weights(tmp_path / "w", TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["a"], header["b"])
    text = json.dumps(header).encode().ljust(248 + 64)
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(EngineError, match=f"weights .*: found {found}"):
        WeightsFile(tmp_path / "w")


def test_another_header_than_the_programs(tmp_path: Path) -> None:
    weights = WeightsFile(write_weights(tmp_path / "w", TENSORS))
    with pytest.raises(EngineError, match=r"^engine: header of .*w: found SHA-256 \w{12}…, expected 000000000000…; copy"):
        weights.require(["a"], "0" * 64)


@pytest.mark.skipif(Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2", reason="needs overcommit")
def test_released_pages_are_read_again(tmp_path: Path) -> None:
    """Also those of a tensor that is smaller than a page, of which there is nothing to release."""
    tensors = {"small": TENSORS["a"], "large": np.arange(1 << 20, dtype=np.float32), "last": TENSORS["b"]}
    weights = WeightsFile(write_weights(tmp_path / "w", tensors))
    for _ in range(2):
        for name, tensor in tensors.items():
            assert ctypes.string_at(weights.address(name), tensor.nbytes) == tensor.tobytes()
        assert mapped_bytes(tmp_path / "w") >= 4 << 20
        for name in tensors:
            weights.release(name)
        assert mapped_bytes(tmp_path / "w") < 1 << 20


def mapped_bytes(path: Path) -> int:
    """The bytes of a file that this process has in memory."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
    raise AssertionError(f"{path} is not mapped")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_memory_of_the_heap_is_given_back() -> None:
    """Also below memory that is still in use, which keeps it otherwise."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    size = 64 << 10  # small enough for the heap
    blocks = [library.malloc(size) for _ in range(512)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, size)
    for block in blocks[:-1]:
        library.free(ctypes.c_void_p(block))
    before = resident_bytes()
    trim_heap()
    assert resident_bytes() <= before - (24 << 20)
    library.free(ctypes.c_void_p(blocks[-1]))


_SHARED = """
import ctypes, threading
from belle_compile.runtime.memory import share_heap
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
share_heap()
found = []
thread = threading.Thread(target=lambda: found.append(library.malloc(100_000)))
thread.start()
thread.join()
(heap,) = (line for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
start, stop = (int(word, 16) for word in heap.split()[0].split("-"))
assert start <= found[0] < stop, (hex(found[0]), heap)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_threads_share_a_heap() -> None:
    subprocess.run([sys.executable, "-c", _SHARED], check=True, timeout=60)


_REUSED = """
import resource, sys
import numpy as np
from belle_compile.runtime.memory import reuse_heap
if sys.argv[1] == "reused":
    reuse_heap()
np.ones(1 << 21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 21)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_of_large_arrays_is_reused() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _REUSED, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert faults("reused") < 20 <= faults("given back")


def resident_bytes() -> int:
    """The memory of this process that is not swapped out."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_anonymous_memory_is_zero_writable_and_free_until_touched() -> None:
    small = anonymous(100)
    assert small.ctypes.data % 64 == 0 and not small.any() and len(small) == 100
    huge = anonymous(1 << 42)  # 4 TiB: more than any test host has
    huge[1 << 41] = 7
    assert huge[1 << 41] == 7
    with pytest.raises(EngineError, match=r"memory: found .* for 1073741824\.0 GiB; load with less memory for the KV cache"):
        anonymous(1 << 60)
