"""What an engine for TensorRT consists of: the plan that TensorRT wrote, and tensorrt.json with what the executor has to know.

A plan runs with the library and, unless it is version compatible, with the version alone that built it, on a GPU with the
compute capability it was built for. It has two optimization profiles with one shape each, so that a token is always computed by
the same kernels: one for answers, a token of each sequence, and one for a chunk of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.tensorrt_library import STAGE
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.schema import canonical_json, from_plain, json_schema, parse_json, refuse_from, to_plain
from belle_compile.runtime.serving.kv_blocks import blocks_for

PLAN_NAME, FACTS_NAME = "engine.plan", "tensorrt.json"
REBUILD = "rebuild the engine with belle-compile build"

SEQUENCES = 8  # that can run at the same time: each has memory for the longest sequence
CHUNK_TOKENS = 128  # tokens of a prompt that are computed in one run
CHUNK_ROWS = 8  # of them, how many can have logits
MOST_CONTEXT = 2048  # tokens of the longest sequence, whatever the model's own limit is


@dataclass(frozen=True)
class Profile:
    """The shape of a run: `tokens` tokens for each of `sequences` sequences, and `rows` rows of logits."""

    sequences: int
    tokens: int
    rows: int


ANSWERS = Profile(SEQUENCES, 1, SEQUENCES)
PROMPTS = Profile(1, CHUNK_TOKENS, CHUNK_ROWS)
PROFILES = (ANSWERS, PROMPTS)  # in the order of the plan


@dataclass(frozen=True)
class LayerReport:
    """The kernels of one profile, as a plan of TensorRT for RTX lists them: products of INT8 activations and weights, products
    of floats with INT8 weights, other products, attention, and everything else."""

    int8_products: int
    int8_weight_products: int
    float_products: int
    attention: int
    other: int

    @property
    def total(self) -> int:
        return self.int8_products + self.int8_weight_products + self.float_products + self.attention + self.other


@dataclass(frozen=True)
class PlanFacts:
    """The content of tensorrt.json. The version `version` of the library `library` built the plan, which runs with later ones
    too where it is `version_compatible`. `floats` is the type of keys and values, and `capacity` the positions of a sequence in
    the cache. `layers` are the numbers of kernels of each kind, by profile or for the plan as a whole; empty where the library
    does not list them in the way of the version that this was written for."""

    library: str
    version: str
    version_compatible: bool
    arch: str
    plan_bytes: int
    floats: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    capacity: int
    dynamic_rope: bool
    layers: dict[str, dict[str, int]]

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers together."""
        return 2 * {"float16": 2, "float32": 4}[self.floats] * self.num_layers * self.num_kv_heads * self.head_dim


def max_context(max_position: int) -> int:
    """Tokens of the longest sequence of an engine for a model with that many positions, in whole blocks."""
    return min(blocks_for(max_position) * BLOCK_SIZE, MOST_CONTEXT)


def capacity_for(context: int) -> int:
    """The positions of a sequence in the cache: behind the longest one there is room for the tokens that fill up a run."""
    return context + CHUNK_TOKENS


def facts_text(facts: PlanFacts) -> str:
    return canonical_json(to_plain(facts))


def facts_schema() -> dict[str, object]:
    """JSON Schema of tensorrt.json."""
    return json_schema(PlanFacts, "belle-compile tensorrt.json")


def read_facts(rank: Path) -> PlanFacts:
    """Read and validate tensorrt.json of a rank's directory, and check the size of its plan; raises `EngineError`."""
    path, plan = rank / FACTS_NAME, rank / PLAN_NAME
    try:
        plain = parse_json(path.read_bytes())
        size = plan.stat().st_size
    except OSError as error:
        raise EngineError(STAGE, f"{error.filename} cannot be read", found=str(error.strerror), remedy=REBUILD) from None
    except ValueError as error:
        raise EngineError(STAGE, f"{path} is not JSON", found=str(error), remedy=REBUILD) from None
    facts = from_plain(PlanFacts, plain, refuse_from(f"{STAGE}: {path}", REBUILD))
    if size != facts.plan_bytes:
        remedy = f"copy the engine again, or {REBUILD}"
        raise EngineError(STAGE, f"size of {plan}", found=f"{size} bytes", expected=f"{facts.plan_bytes}", remedy=remedy)
    return facts
