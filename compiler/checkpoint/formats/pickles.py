"""Pickled PyTorch weights (.bin), read with the restricted unpickler, so that no code in them can run."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from belle_compile.compiler.checkpoint.formats.pickle_checks import MoreThanTensors, check_archive, check_legacy
from belle_compile.compiler.checkpoint.formats.shards import Storage
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor, changed
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.untrusted import explained

if TYPE_CHECKING:
    import torch


def open_pickle(file: Path, legacy: LegacyFile) -> list[LazyTensor]:
    """The tensors of one file, under the names stored in it; all files of a checkpoint share one `legacy`.

    Raises CompileError if the file is damaged or holds anything but tensors.
    """
    refuse_pointer(file)
    state = _state_dict(file)
    tensors = []
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        tensors.append(LazyTensor(str(name), tuple(value.shape), dtype, file, _Loader(file, name, legacy)))
    return tensors


def is_legacy(file: Path) -> bool:
    """Whether the file is in PyTorch's format before 1.6, which is no zip archive and cannot be memory-mapped."""
    with file.open("rb") as f:
        return f.read(4) != b"PK\x03\x04"


class LegacyFile:
    """Cache of the legacy-format file that was read last.

    Such a file can only be read whole, and reading it again for every tensor would take a day. Each opened checkpoint keeps at
    most one file in memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._state: dict[str, torch.Tensor] = {}

    def state_dict(self, file: Path) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._file != file:
                self._file, self._state = None, {}  # frees the old file before the next one is read
                self._state = _state_dict(file)
                self._file = file
            return self._state


def _legacy_note(files: Sequence[Path]) -> list[str]:
    legacy = [file.name for file in files if is_legacy(file)]
    if not legacy:
        return []
    return [
        f"{', '.join(legacy)}: the format of PyTorch before 1.6 cannot be memory-mapped, so the build holds one such file in "
        "memory"
    ]


# pytorch_model.bin or shards of it. The cache is made anew for each checkpoint.
PICKLES = Storage("pytorch_model", "bin", lambda: partial(open_pickle, legacy=LegacyFile()), _legacy_note)


class _Loader:
    """Reads rows of one tensor. It maps the file for each read only; unpickling the table of tensors takes milliseconds."""

    def __init__(self, file: Path, name: str, legacy: LegacyFile) -> None:
        self.file, self.name, self.legacy = file, name, legacy

    def __call__(self, start: int, stop: int) -> npt.NDArray[Any]:
        import torch

        state = self.legacy.state_dict(self.file) if is_legacy(self.file) else _state_dict(self.file)
        if self.name not in state:
            raise changed(self.file, f"no tensor {self.name}")
        tensor = state[self.name]
        part = tensor[start:stop] if tensor.ndim else tensor
        dtype = torch.float32 if part.is_floating_point() else part.dtype
        values: npt.NDArray[Any] = part.detach().to(dtype, copy=True).numpy()  # a copy, since the mapping is closed
        return values


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a file; its values stay on disk, except in the legacy format."""
    import torch

    found = f"a file of {file.stat().st_size} bytes that does not load"
    remedy = "it is truncated or damaged: download it again"
    with explained(STAGE, f"weights {file}", found=found, expected="a complete PyTorch state dict", remedy=remedy):
        legacy = is_legacy(file)
        try:
            check_legacy(file) if legacy else check_archive(file)
            with file.open("rb") as f:
                state = torch.load(f if legacy else file, map_location="cpu", weights_only=True, mmap=not legacy)
        except (MoreThanTensors, pickle.UnpicklingError) as e:
            if "Unsupported operand" in str(e):  # an unsupported operand means that the file is not a pickle at all
                raise ValueError(_reason(e)) from e
            raise CompileError(
                STAGE,
                f"weights {file}",
                found=f"a pickle that holds more than tensors ({_reason(e)})",
                expected="a state dict of tensors; code in pickles is never run",
                remedy="use a safetensors release of this checkpoint",
            ) from e
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(_is_named_tensor(name, value) for name, value in state.items()):
            raise CompileError(
                STAGE,
                f"weights {file}",
                found=f"a pickled {type(state).__name__} that holds more than tensors",
                expected="a state dict as save_pretrained writes it",
            )
        return state


def _is_named_tensor(name: object, value: object) -> bool:
    """Whether an entry of a state dict is a tensor whose values are in the file, of no more than the file's size."""
    import torch

    if type(name) is not str or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    assert isinstance(value, torch.Tensor)
    if value.is_nested or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """The line of PyTorch's error message that gives the reason, without its advice."""
    lines = [line.strip() for line in io.StringIO(str(error)) if line.strip()]
    first = lines[0] if lines else type(error).__name__
    line = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), first)
    return line.split(". ")[0].rstrip(".")[:200]
