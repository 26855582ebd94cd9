"""Sums of x x^T over the inputs x of a linear, by which its weights are rounded."""

from __future__ import annotations

import torch

from belle_compile.compiler.ir.torch_meanings import linear

Tensor = torch.Tensor

_BLOCK = 128  # rows of the matrix that one product computes


def products(x: Tensor) -> list[Tensor]:
    """The blocks of rows of x^T x [K, K] for x [tokens, K]; of each, only what is not left of the diagonal."""
    columns = x.T.contiguous()
    return [linear(columns[start : start + _BLOCK], columns[start:]) for start in range(0, len(columns), _BLOCK)]


class SecondMoments:
    """The float32 matrix sum x x^T [K, K], which is symmetric: half of it is kept."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @torch.inference_mode()
    def add(self, blocks: list[Tensor]) -> None:
        """Add the `products` of some tokens."""
        if not self._blocks:
            self._blocks = blocks
            return
        for block, product in zip(self._blocks, blocks, strict=True):
            block += product

    @torch.inference_mode()
    def matrix(self) -> Tensor:
        """float32 [K, K]."""
        inputs = self._blocks[0].shape[1]
        whole = torch.empty(inputs, inputs, device=self._blocks[0].device)
        for start, block in zip(range(0, inputs, _BLOCK), self._blocks, strict=True):
            whole[start : start + len(block), start:] = block
            whole[start:, start : start + len(block)] = block.T
        return whole
