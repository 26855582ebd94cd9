"""The original LLaMA releases: params.json, tokenizer.model, and weights in as many files as ran in parallel.

Names, layouts and dimensions are those of facebookresearch/llama (llama/model.py); `consolidated.NN.pth` holds the part of
every tensor that process NN of the model had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.formats.gguf_rows import interleaved_halves
from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor, require_float
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath

PARAMS = "params.json"
PARTS = "consolidated.[0-9][0-9].pth"
_TOKENIZER = "tokenizer.model"
_EMBEDDING = "tok_embeddings.weight"
_MOST = 1 << 24  # of a dimension
_REMEDY = "download every consolidated.*.pth of the model, and its params.json"
# The tensors of a layer: the name in Hugging Face checkpoints, and the axis that its parts lie along (None: all hold it whole).
_LAYER: Mapping[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_OUTER: Mapping[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
_ROTATED = ("attention.wq", "attention.wk")  # their rows pair neighbours for the rotary embedding
_NAME = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<module>[\w.]+)\.weight")
_BUFFERS = ("rope.freqs",)
_KEYS = frozenset(
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta max_seq_len max_batch_size "
    "use_scaled_rope".split()
)


@dataclass(frozen=True)
class _Params:
    """The dimensions in params.json; `ffn` is the width of the feed-forward layers that follows from them."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    epsilon: float
    rope_theta: float
    positions: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def config(self, vocabulary: int) -> dict[str, Any]:
        """config.json of this model, in the keys of Transformers' LlamaConfig."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
        }


class OriginalLlama:
    """A directory with params.json and consolidated.00.pth, and tokenizer.model there or in the directory above."""

    weights = ("consolidated.00.pth", PARTS)

    def recognises(self, files: Files) -> bool:
        return files.directory is not None and bool(files.matching(PARAMS)) and bool(files.matching(PARTS))

    def read(self, files: Files) -> Contents:
        directory, parts = files.path, files.matching(PARTS)
        file = directory / PARAMS
        params, stated_vocabulary = _read_params(file)
        stored = [{tensor.name: tensor for tensor in open_pickle(part)} for part in parts]
        _check_parts(directory, parts, stored, params)
        tensors = [_whole(name, [part[name] for part in stored], params) for name in stored[0] if not _is_buffer(name)]
        embedding = next((tensor for tensor in tensors if tensor.name == "model.embed_tokens.weight"), None)
        vocabulary = embedding.shape[0] if embedding is not None else 0
        if stated_vocabulary not in (-1, vocabulary):
            expected = f"an embedding of {stated_vocabulary} rows, as {PARAMS} states"
            raise CompileError(STAGE, f"weights in {directory}", found=f"{vocabulary} rows", expected=expected, remedy=_REMEDY)
        tokenizer = _tokenizer_directory(directory)
        tokenizer_json, tokenizer_files, notes, implied = load_tokenizer(tokenizer, vocabulary)
        assumed = f"{PARAMS} states no context length: {params.positions}, that of the LLaMA release with these dimensions"
        return Contents(
            config=params.config(vocabulary),
            tensors=tensors,
            tokenizer_json=tokenizer_json,
            implied=implied,
            files=[file, *parts, *tokenizer_files],
            notes=[*notes, assumed],
        )


def _tokenizer_directory(directory: StoredPath) -> StoredPath:
    """The directory with the tokenizer: in LLaMA's first release, it lies above those of the models of each size."""
    own = directory / _TOKENIZER, directory / "tokenizer.json"
    above = directory.parent / _TOKENIZER
    return directory.parent if not any(file.is_file() for file in own) and above.is_file() else directory


def _read_params(file: StoredPath) -> tuple[_Params, int]:
    """The dimensions and the stated vocabulary (-1 if it is the tokenizer's); raises CompileError for what is no LLaMA's."""
    stated = read_json(file)
    if unknown := sorted(set(stated) - _KEYS):
        remedy = "this variant is not supported: give its Hugging Face checkpoint"
        raise _wrong_params(file, f"the key {unknown[0][:100]}", "the keys of LLaMA and Llama 2", remedy)
    if stated.get("use_scaled_rope"):
        remedy = "give its Hugging Face checkpoint"
        raise _wrong_params(file, "use_scaled_rope, of Llama 3.1 or later", "LLaMA or Llama 2", remedy)

    def number(key: str, default: float | None = None, *, whole: bool = True) -> Any:
        value: Any = default if stated.get(key) is None else stated[key]
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < _MOST:
            expected = f"a positive {'whole ' if whole else ''}number"
            raise _wrong_params(file, f"{key} {str(value)[:100]}", expected, "download it again")
        return value

    dim, heads = number("dim"), number("n_heads")
    kv_heads, epsilon = number("n_kv_heads", heads), number("norm_eps", 1e-5, whole=False)
    if dim % heads or heads % kv_heads or dim // heads % 2:
        found = f"dim {dim}, n_heads {heads} and n_kv_heads {kv_heads}"
        raise _wrong_params(file, found, "heads of one even size, shared evenly", "download it again")
    ffn, multiple = 2 * 4 * dim // 3, number("multiple_of", 256)
    if stated.get("ffn_dim_multiplier") is not None:
        ffn = int(number("ffn_dim_multiplier", whole=False) * ffn)
    theta = float(number("rope_theta", 10000.0, whole=False))
    vocabulary = stated.get("vocab_size", -1)
    params = _Params(
        dim=dim, layers=number("n_layers"), heads=heads, kv_heads=kv_heads, ffn=-(-ffn // multiple) * multiple,
        epsilon=float(epsilon), rope_theta=theta, positions=_positions(dim, heads, kv_heads, epsilon, theta),
    )  # fmt: skip
    return params, vocabulary


def _positions(dim: int, heads: int, kv_heads: int, epsilon: float, theta: float) -> int:
    """The context length, which params.json leaves to the program that runs the model, by the releases' other settings."""
    if theta == 1e6:
        return 16384  # Code Llama
    if theta == 5e5:
        return 8192  # Llama 3
    llama_65b = dim == 8192 and heads == kv_heads  # the only one of the first release with the epsilon of Llama 2
    return 4096 if epsilon == 1e-5 and not llama_65b else 2048


def _wrong_params(file: StoredPath, found: str, expected: str, remedy: str) -> CompileError:
    return CompileError(STAGE, f"file {file}", found=found, expected=expected, remedy=remedy)


def _is_buffer(name: str) -> bool:
    return name in _BUFFERS


def _check_parts(
    directory: StoredPath, parts: Sequence[StoredPath], stored: Sequence[Mapping[str, LazyTensor]], params: _Params
) -> None:
    """Raise CompileError unless the files are all parts of a model: their number follows from the rows of a layer."""

    def wrong(found: str, expected: str) -> CompileError:
        return CompileError(STAGE, f"weights in {directory}", found=found, expected=expected, remedy=_REMEDY)

    names = [part.name for part in parts]
    first = stored[0].get("layers.0.attention.wq.weight")
    if first is None or len(first.shape) != 2 or not first.shape[0] or params.dim % first.shape[0]:
        raise wrong(f"{names[0]} without rows of layers.0.attention.wq.weight", f"a part of {params.dim} rows")
    count = params.dim // first.shape[0]
    expected = [f"consolidated.{number:02d}.pth" for number in range(count)]
    if names != expected:
        missing = [name for name in expected if name not in names]
        found = f"no {', '.join(missing)}" if missing else f"{len(names)} files"
        raise wrong(found, f"the {count} part{'s' if count > 1 else ''} that {names[0]} is one of")
    for name, part in zip(names[1:], stored[1:], strict=True):
        if odd := {key for key in stored[0].keys() ^ part.keys() if not _is_buffer(key)}:
            raise wrong(f"{sorted(odd)[0]} in one of {names[0]} and {name} only", "parts of one model")


def _whole(name: str, parts: Sequence[LazyTensor], params: _Params) -> LazyTensor:
    """A tensor of all parts, under its name and in its layout in Hugging Face checkpoints."""
    match = _NAME.fullmatch(name)
    layer, module = (match["layer"], match["module"]) if match else (None, "")
    known = (_LAYER if layer is not None else _OUTER).get(module)
    if known is None:
        raise CompileError(
            STAGE,
            f"tensor {name} in {parts[0].file}",
            found="an unknown name",
            expected="the tensors of LLaMA",
            remedy="this variant is not supported: give its Hugging Face checkpoint",
        )
    for part in parts:
        require_float(part)
    new_name = f"{f'model.layers.{layer}.' if layer is not None else ''}{known[0]}.weight"
    shape, axis = parts[0].shape, known[1]
    if name == _EMBEDDING and len(shape) == 2 and shape[1] == params.dim:
        axis = 0  # Llama 3 divides the vocabulary
    if any(part.shape != shape for part in parts):
        other = next(part for part in parts if part.shape != shape)
        raise CompileError(
            STAGE, f"tensor {name} in {other.file}", found=f"shape {list(other.shape)}",
            expected=f"{list(shape)}, that in {parts[0].file.name}", remedy=_REMEDY,
        )  # fmt: skip
    divided = axis if len(parts) > 1 and len(shape) == 2 else None
    load = _Parts(tuple(parts), divided, params.head_dim if module in _ROTATED else 0)
    return LazyTensor(new_name, load.shape, parts[0].dtype, parts[0].file, load, (f"{_files(parts)}: {name}",))


def _files(parts: Sequence[LazyTensor]) -> str:
    last = f" to {parts[-1].file.name}" if len(parts) > 1 else ""
    return f"{parts[0].file.name}{last}"


@dataclass(frozen=True)
class _Parts:
    """Reads rows of a tensor whose parts lie along `axis` (None: the first is all of it). `head_dim` is set for Q and K, whose
    rows are stored as pairs of neighbours, and are those of Hugging Face's two halves of a head here."""

    parts: tuple[LazyTensor, ...]
    axis: int | None
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        if self.axis is None:
            return shape
        return tuple(size * (len(self.parts) if axis == self.axis else 1) for axis, size in enumerate(shape))

    def __call__(self, start: int, stop: int) -> npt.NDArray[Any]:
        if not self.head_dim or start == stop:
            return self._stored(start, stop)
        order = interleaved_halves(self.head_dim)(np.arange(start, stop))
        first = int(order.min())
        return self._stored(first, int(order.max()) + 1)[order - first]

    def _stored(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows in the order of the files."""
        if self.axis is None:
            return self.parts[0].load(start, stop)
        if self.axis == 1:
            return np.concatenate([part.load(start, stop) for part in self.parts], axis=1)
        rows = self.parts[0].shape[0]
        pieces = []
        for number, part in enumerate(self.parts):
            first, last = max(start - number * rows, 0), min(stop - number * rows, rows)
            if first < last:
                pieces.append(part.load(first, last))
        return np.concatenate(pieces) if pieces else self.parts[0].load(0, 0)
