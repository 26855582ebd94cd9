"""Sums of x x^T over the inputs x of a linear, by which its weights are rounded."""

from __future__ import annotations

import torch

from belle_compile.compiler.ir.torch_meanings import linear

Tensor = torch.Tensor

_BLOCK = 128  # rows of the matrix that one product computes


class SecondMoments:
    """The float32 matrix sum x x^T [K, K]. It is symmetric: of each block of rows, only what is not left of it is computed."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add the rows of x [tokens, K]."""
        columns = x.T.contiguous()
        products = (linear(columns[start : start + _BLOCK], columns[start:]) for start in range(0, len(columns), _BLOCK))
        if not self._blocks:
            self._blocks = list(products)
            return
        for block, product in zip(self._blocks, products, strict=True):
            block += product

    def matrix(self) -> Tensor:
        """float32 [K, K]."""
        inputs = self._blocks[0].shape[1]
        whole = torch.empty(inputs, inputs, device=self._blocks[0].device)
        for start, block in zip(range(0, inputs, _BLOCK), self._blocks, strict=True):
            whole[start : start + len(block), start:] = block
            whole[start:, start : start + len(block)] = block.T
        return whole
