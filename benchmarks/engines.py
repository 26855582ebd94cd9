"""The engines that are measured: SmolLM2-135M with its weights, other shapes with random ones; made when missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.memory import WeightsFile
from belle_compile.runtime.profiling import kv_bytes_per_token
from belle_compile.runtime.program import Program, Weight
from belle_compile.runtime.program_json import read_program
from benchmarks import checkpoints, fetch_smollm2

SMOLLM2 = "smollm2-135m"
SHAPES = (SMOLLM2, *checkpoints.SHAPES)
DEFAULT_SHAPES = (SMOLLM2, "llama-1b", "bloom-1b1")


@dataclass(frozen=True)
class Cost:
    """What a step must read and compute at least, by the engine's program."""

    weight_bytes: int  # read by a step with logits: every linear layer and norm once, no embedding table
    kv_bytes_per_token: int  # of a cached token, all layers
    operations_per_token: int  # multiplications and additions with int8 weights, without the head
    operations_per_row: int  # those of the head, for each row of logits
    isas: tuple[str, ...]

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that a step with one token in each of `batch` sequences reads, at a mean context of `context` tokens."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token

    def prefill_operations(self, tokens: int) -> int:
        """Operations of a prompt with one row of logits; attention's float arithmetic is not counted."""
        return tokens * self.operations_per_token + self.operations_per_row


def cost(engine: Path) -> Cost:
    """Read the program and the sizes of its weights."""
    program = read_program(engine / "rank0")
    sizes = WeightsFile(engine / "rank0" / "weights.safetensors").sizes
    weight_bytes = sum(call.bytes for call in program.calls)
    per_token, per_row = (_operations(program, sizes, rows) for rows in ("T", "R"))
    return Cost(weight_bytes, kv_bytes_per_token(program), per_token, per_row, read_manifest(engine).target.isas)


def prepare(name: str, *, preset: str = "int8", reuse: bool = False) -> Path:
    """Compile a shape to build/engines, from its checkpoint in build/, which is made once; `reuse` keeps an engine as it is."""
    engine = Path("build/engines") / (name if preset == "int8" else f"{name}-{preset}")
    if not (reuse and (engine / "manifest.json").is_file()):
        from belle_compile.compiler.driver import BuildRequest, build

        engine.parent.mkdir(parents=True, exist_ok=True)
        folder = Path("build/checkpoints") / name
        source = fetch_smollm2.fetch(Path("build/smollm2")) if name == SMOLLM2 else checkpoints.make(name, folder)
        build(BuildRequest(source, engine, quantization=preset, force=True))
    return engine


def _operations(program: Program, sizes: dict[str, int], rows: str) -> int:
    """Two for every integer weight of the linear layers over these rows; int4 has two weights a byte."""
    per_byte = {"qlinear": 2, "glinear": 4}
    linears = (call for call in program.calls if call.kind in per_byte and call.rows == rows)
    return sum(per_byte[call.kind] * max(sizes[arg.name] for arg in call.args if isinstance(arg, Weight)) for call in linears)
