"""Random orthogonal matrices that are cheap to apply: signs, a Hadamard transform, and a small matrix across its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_LEAST = 1e-6  # squared length below which a vector counts as 0
_CHUNK = 1024  # rows or columns rotated at a time, so that temporaries stay small beside the weight


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of `size` rows, which `seed` determines.

    size = blocks * 2**k: columns get random signs, each block of 2**k is Hadamard transformed, and a random orthogonal
    blocks x blocks matrix mixes the blocks. `blocks` is odd, and 1 for a power of two.
    """

    size: int
    seed: int

    def right(self, weight: Floats, *, scale: Floats | None = None, out: Floats | None = None) -> Floats:
        """weight @ diag(scale) @ Q for a weight [rows, size]; `out` may be the weight itself."""
        blocks, outer, inner = self._factors()
        signs, mixer = self._parts(blocks)
        low, high = _hadamard(inner), _hadamard(outer)
        result = np.empty(weight.shape, np.float32) if out is None else out
        for start in range(0, len(weight), _CHUNK):
            rows = slice(start, start + _CHUNK)
            x = weight[rows] * signs if scale is None else weight[rows] * scale * signs
            x = x.reshape(-1, inner) @ low
            x = np.matmul(high, x.reshape(-1, outer, inner))
            if blocks > 1:
                x = np.matmul(mixer, x.reshape(-1, blocks, outer * inner))
            result[rows] = x.reshape(-1, self.size)
        return result

    def parts(self) -> dict[str, Floats]:
        """The `signs` [size] and the `mixer` [blocks, blocks] that make Q."""
        blocks, _, _ = self._factors()
        signs, mixer = self._parts(blocks)
        return {"signs": signs, "mixer": mixer if blocks > 1 else np.ones((1, 1), np.float32)}

    def left(self, weight: Floats) -> Floats:
        """Q.T @ weight for a weight [size, columns]."""
        blocks, outer, inner = self._factors()
        signs, mixer = self._parts(blocks)
        low, high = _hadamard(inner), _hadamard(outer)
        result = np.empty(weight.shape, np.float32)
        for start in range(0, weight.shape[1], _CHUNK):
            columns = slice(start, start + _CHUNK)
            x = weight[:, columns] * signs[:, None]
            count = x.shape[1]
            x = np.matmul(low, x.reshape(-1, inner, count))
            x = np.matmul(high, x.reshape(blocks, outer, inner * count))
            if blocks > 1:
                x = mixer @ x.reshape(blocks, -1)
            result[:, columns] = x.reshape(self.size, count)
        return result

    def _factors(self) -> tuple[int, int, int]:
        """size = blocks * outer * inner: the transform of outer * inner is two products with small matrices."""
        width = self.size & -self.size  # the largest power of two that divides the size
        inner = 1 << (width.bit_length() // 2)
        return self.size // width, width // inner, inner

    def _parts(self, blocks: int) -> tuple[Floats, Floats]:
        """Signs [size] and an orthogonal matrix [blocks, blocks]."""
        random = np.random.default_rng([self.seed, self.size])
        signs = random.choice(np.array([-1, 1], np.float32), self.size)
        mixer, triangle = np.linalg.qr(random.standard_normal((blocks, blocks)))
        # QR is unique up to the signs of the rows of R, which LAPACK chooses: making R's diagonal positive fixes them.
        return signs, (mixer * np.sign(np.diag(triangle))).T.astype(np.float32)


@dataclass(frozen=True)
class CenteredRotation:
    """An orthogonal matrix Q of `size` rows whose rows and columns each add up to 1, which `seed` determines.

    Q = R (I - 2 w w^T / w^T w) for the rotation R of that seed: the reflection takes 1 R back to 1, where w = 1 R - 1. A vector
    has the same mean before and after it.
    """

    size: int
    seed: int

    def right(self, weight: Floats, *, scale: Floats | None = None, out: Floats | None = None) -> Floats:
        """weight @ diag(scale) @ Q for a weight [rows, size]; `out` may be the weight itself."""
        result, w = self._rotation.right(weight, scale=scale, out=out), self._mirror
        for start in range(0, len(result), _CHUNK):
            rows = result[start : start + _CHUNK]
            rows -= np.outer(rows @ w, w)
        return result

    def left(self, weight: Floats) -> Floats:
        """Q.T @ weight for a weight [size, columns]; Q.T @ b for a vector is `right` of it."""
        result, w = self._rotation.left(weight), self._mirror
        result -= np.outer(w, w @ result)
        return result

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.size, self.seed)

    @property
    def _mirror(self) -> Floats:
        """float32 [size]: w sqrt(2 / w^T w), which is 0 where R leaves 1 in place."""
        ones = np.ones((1, self.size), np.float32)
        w = self._rotation.right(ones).astype(np.float64)[0] - 1
        length = float(w @ w)
        mirror: Floats = (w * np.sqrt(2 / length) if length > _LEAST else w * 0).astype(np.float32)
        return mirror


@cache
def _hadamard(size: int) -> Floats:
    """The normalized, symmetric Walsh-Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normalized: Floats = (matrix / np.sqrt(size)).astype(np.float32)
    return normalized
