"""float32 linear layer for unquantized engines, over weights in panels [outputs/16][inputs][16]."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL, Block, BlockLoop
from belle_compile.compiler.backends.tvm.kernels.tiling import Walk
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr


@dataclass(frozen=True)
class FloatLinear(Kernel, kernels.FloatLinear):
    """Sums of a block of rows and panels stay in registers while the inputs pass."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = self.named(buffers)
        walk = Walk(4, 6) if isa.dot == "vnni" else Walk(2, 3)
        panels = round_up(self.outputs, PANEL) // PANEL
        BlockLoop(tir.rows_of(named["rows"]), panels, walk, lambda block: self._block(block, named)).run()

    def _block(self, block: Block, named: dict[str, Buffer]) -> None:
        x, weight, bias, width = named["x"], named["weight"], named.get("bias"), block.width
        starts = [tir.bind((block.row + m) * self.x.stride + self.x.offset) for m in range(block.height)]
        bases = [tir.bind((block.panel + p) * (self.inputs * PANEL)) for p in range(width)]
        acc = tir.Registers(block.height * width, tir.F16, tir.splat(0.0))

        def step(k: Expr) -> None:
            weights = [tir.bind(tir.load(weight, base + k * PANEL)) for base in bases]
            for m, start in enumerate(starts):
                value = tir.bind(tir.splat(x[start + k]))
                for p in range(width):
                    acc[m * width + p] = acc[m * width + p] + value * weights[p]

        tir.for_range(self.inputs, step)
        for m in range(block.height):
            for p in range(width):
                column = (block.panel + p) * PANEL
                total = acc[m * width + p] if bias is None else acc[m * width + p] + tir.load(bias, column)
                tir.store(named["out"], (block.row + m) * self.out.stride + self.out.offset + column, total)
