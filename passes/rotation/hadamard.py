"""Random orthogonal matrices that are applied in n log n: signs, a Hadamard transform, and a small matrix across its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_ROWS = 1024  # rows rotated at a time, so that temporaries stay small beside the weight


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of `size` rows, the same for the same `seed`.

    size = blocks * 2**k: columns get random signs, each block of 2**k is Hadamard transformed, and a random orthogonal
    blocks x blocks matrix mixes the blocks. `blocks` is odd, and 1 for a power of two.
    """

    size: int
    seed: int

    def right(self, weight: Floats) -> Floats:
        """weight @ Q for a weight [rows, size]."""
        width = self.size & -self.size  # the largest power of two that divides the size
        signs, mixer = self._parts(self.size // width)
        result = np.empty(weight.shape, np.float32)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            block = weight[rows].astype(np.float64) * signs
            block = _hadamard(block.reshape(-1, self.size // width, width))
            result[rows] = np.einsum("rbw,bc->rcw", block, mixer, optimize=True).reshape(len(block), self.size)
        return result

    def left(self, weight: Floats) -> Floats:
        """Q.T @ weight for a weight [size, columns]."""
        return np.ascontiguousarray(self.right(np.ascontiguousarray(weight.T)).T)

    def _parts(self, blocks: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        random = np.random.default_rng([self.seed, self.size])
        signs = random.choice([-1.0, 1.0], self.size)
        mixer, triangle = np.linalg.qr(random.standard_normal((blocks, blocks)))
        return signs, mixer * np.sign(np.diag(triangle))  # the signs make the result independent of LAPACK's choice


def _hadamard(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The normalized Walsh-Hadamard transform of the last axis, a power of two."""
    width, step = x.shape[-1], 1
    shape = x.shape
    while step < width:
        pairs = x.reshape(*shape[:-1], width // (2 * step), 2, step)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(shape)
        step *= 2
    normalized: npt.NDArray[np.float64] = x / np.sqrt(width)
    return normalized
