"""Pickled PyTorch weights (.bin), read with the restricted unpickler so that no code in them can run."""

from __future__ import annotations

import io
import pickle
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError

if TYPE_CHECKING:
    import torch


def open_pickle(file: Path) -> list[LazyTensor]:
    """The tensors of one file, under the names stored in it."""
    state = _state_dict(file)
    tensors = []
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        tensors.append(LazyTensor(str(name), tuple(value.shape), dtype, file, _Loader(file, name)))
    return tensors


def is_legacy(file: Path) -> bool:
    """Whether the file is in PyTorch's format before 1.6, which is no zip archive and cannot be memory-mapped."""
    with file.open("rb") as f:
        return f.read(4) != b"PK\x03\x04"


class _Loader:
    """Maps the file for one read and lets go of it again; unpickling the table of tensors takes milliseconds."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __call__(self, start: int, stop: int) -> npt.NDArray[Any]:
        import torch

        state = _legacy_state_dict(self.file) if is_legacy(self.file) else _state_dict(self.file)
        tensor = state[self.name]
        part = tensor[start:stop] if tensor.ndim else tensor
        values: npt.NDArray[Any] = part.detach().to(torch.float32, copy=True).numpy()  # the original lies in the mapping
        return values


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a file; its values stay on disk, but for the legacy format."""
    import torch

    try:
        with file.open("rb") as f:
            state = torch.load(f if is_legacy(file) else file, map_location="cpu", weights_only=True, mmap=not is_legacy(file))
    except pickle.UnpicklingError as e:
        if "Unsupported operand" not in str(e):  # an operand the format does not have: not a pickle at all
            raise CompileError(
                STAGE,
                f"weights {file}",
                found=f"a pickle that holds more than tensors ({_reason(e)})",
                expected="a state dict of tensors; code in pickles is never run",
                remedy="use a safetensors release of this checkpoint",
            ) from e
        raise _damaged(file, e) from e
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError, IndexError, AttributeError) as e:
        raise _damaged(file, e) from e
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CompileError(
            STAGE,
            f"weights {file}",
            found=f"a pickled {type(state).__name__} that holds more than tensors",
            expected="a state dict as save_pretrained writes it",
        )
    return state


@lru_cache(maxsize=1)
def _legacy_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A legacy file is read whole; one of them is kept, since reading it for every tensor would take a day."""
    return _state_dict(file)


def _damaged(file: Path, error: Exception) -> CompileError:
    return CompileError(
        STAGE,
        f"weights {file}",
        expected="a complete PyTorch state dict",
        remedy="it is truncated or damaged: download it again",
        found=f"a file of {file.stat().st_size} bytes that does not load ({_reason(error)})",
    )


def _reason(error: Exception) -> str:
    """The line of PyTorch's advice that says what happened."""
    lines = [line.strip() for line in io.StringIO(str(error)) if line.strip()]
    first = lines[0] if lines else type(error).__name__
    line = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), first)
    return line.split(". ")[0].rstrip(".")[:200]
