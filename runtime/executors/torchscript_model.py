"""What is in model.ts beside the traced graph: the facts that an executor needs before it loads PyTorch."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program import BLOCK_SIZE, KV_DTYPES, SCALES_BYTES
from belle_compile.runtime.schema import from_plain, parse_json, refuse_from

STAGE = "torchscript"
MODEL_NAME = "model.ts"
FACTS_NAME = "belle.json"  # an extra file of the module, which libtorch reads too
FACTS_MEMBER = f"model/extra/{FACTS_NAME}"
STEP_TOKENS, STEP_ROWS, STEP_SEQUENCES = 256, 64, 64
REMEDY = "copy the engine again or rebuild it"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor that weights.safetensors holds as a padded row: its type and shape, and the module's attributes that it becomes.
    It is `attribute` as it is, and `packed` by `onednn::qlinear_prepack`; "" where there is no such attribute."""

    attribute: str
    packed: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a module. `torch` is the version of PyTorch that traced it, `tile` the number of positions of a sequence
    whose attention is computed together, and `weights_header` the SHA-256 of the header of weights.safetensors."""

    torch: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    vocab_size: int
    kv_dtype: str
    tile: int
    weights_header: str
    weights: dict[str, StoredWeight]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the KV cache, keys and values of all layers."""
        return kv_block_bytes(self.num_layers, self.num_kv_heads, self.head_dim, self.kv_dtype)


def kv_block_bytes(layers: int, kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of a block of a KV cache of that type, keys and values of all layers."""
    head = BLOCK_SIZE * head_dim * KV_DTYPES[dtype] + (SCALES_BYTES if dtype == "int8" else 0)
    return 2 * layers * kv_heads * head


def query_tile(heads_per_kv_head: int) -> int:
    """The number of neighbouring positions whose attention is computed together: a power of two, so that at least 8 rows of
    queries read the same keys."""
    tile = 1
    while tile * heads_per_kv_head < 8:
        tile *= 2
    return tile


def read_facts(path: Path) -> ModelFacts:
    """Read the facts in a module; raises `EngineError` where it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            plain = parse_json(archive.read(FACTS_MEMBER))
    except FileNotFoundError:
        raise EngineError("engine", f"file {path} is missing", remedy=REMEDY) from None
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError, ValueError) as error:
        raise EngineError(STAGE, f"module {path}", found=str(error), expected="a whole archive", remedy=REMEDY) from None
    return from_plain(ModelFacts, plain, refuse_from(STAGE, REMEDY))
