"""Files of activations that are written in place of others, since the system makes a new file several times as slowly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_SUFFIX = ".npy"
_RELEASED = "released"  # begins the names of files whose tensors nobody needs


class ActivationFiles:
    """The tensors in a folder by their names. Tensors missing in the folder are read from the `base`.

    `release` gives a tensor's file up for another tensor of the same size, for whose pages the system then needs no memory.
    """

    def __init__(self, folder: Path, base: ActivationFiles | None = None) -> None:
        self._folder, self._base = folder, base
        self._released: dict[int, list[Path]] = {}  # by size in bytes
        self._count = 0

    def read(self, name: str) -> torch.Tensor:
        """The tensor with this name."""
        path = self._path(name)
        if self._base is not None and not path.exists():
            return self._base.read(name)
        return torch.from_numpy(np.load(path))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor on the CPU, over the one of the same name if there is one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path, array = self._path(name), tensor.contiguous().numpy()
        if not path.exists() and (free := self._released.get(array.nbytes)):
            free.pop().replace(path)
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            np.save(file, array)
            file.truncate()

    def release(self, name: str) -> None:
        """Give up a tensor; does nothing where there is none with this name."""
        path = self._path(name)
        if path.exists():
            array = np.load(path, mmap_mode="r")
            free = self._path(f"{_RELEASED}-{self._count:05d}")
            self._count += 1
            path.replace(free)
            self._released.setdefault(array.nbytes, []).append(free)

    def remove_released(self) -> None:
        """Remove the files that were given up, those of an earlier process too."""
        self._released.clear()
        for path in self._folder.glob(f"{_RELEASED}-*{_SUFFIX}"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"
