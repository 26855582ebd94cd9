"""LLaMA checkpoints in GGUF: a Hugging Face config from the metadata, and tensors dequantised row by row when read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.contents import Contents
from belle_compile.compiler.checkpoint.gguf_tokenizer import gguf_tokenizer
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError

if TYPE_CHECKING:
    from gguf import GGUFReader

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_gguf(file: Path, *, directory: Path | None = None) -> Contents:
    """The contents of a .gguf file; a tokenizer.json in `directory` outranks the tokenizer in its metadata."""
    reader = _reader(file)
    meta = {key: field for key, field in reader.fields.items()}

    def get(key: str, default: Any = None) -> Any:
        return meta[key].contents() if key in meta else default

    architecture = get("general.architecture")
    if architecture != "llama":
        raise CompileError(
            STAGE,
            f"GGUF {file}",
            found=f"architecture {architecture}",
            expected="llama",
            remedy="give the Hugging Face checkpoint of this model, if it is of the BLOOM family",
        )
    if (parts := get("split.count", 1)) > 1:
        raise CompileError(
            STAGE,
            f"GGUF {file}",
            found=f"one of {parts} parts",
            expected="one whole file",
            remedy="merge the parts with llama-gguf-split --merge",
        )
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    config = _config(file, get, shapes)
    tensors = [_tensor(file, tensor, config) for tensor in reader.tensors]
    if directory is not None and (directory / "tokenizer.json").is_file():
        tokenizer_json, tokenizer_files, notes, _ = load_tokenizer(directory)
    else:
        tokenizer_json, notes, tokenizer_files = gguf_tokenizer(file, get), [], []
    packed = sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(FLOATS))
    if packed:
        notes.append(f"{file.name} is quantised already ({', '.join(packed)}): its errors add to those of this build")
    words = get("tokenizer.ggml.tokens", [])
    ids = {kind: get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding", "eot", "eom")}
    special = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
    jinja = get("tokenizer.chat_template")
    return Contents(
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        tokenizer_config={
            **{kind: words[index] for kind, index in special.items() if index is not None and index < len(words)},
            # llama.cpp's default: sentencepiece vocabularies get BOS, byte-level ones do not.
            "add_bos_token": get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model") == "llama"),
        },
        generation={"eos_token_id": [ids[kind] for kind in ("eos", "eot", "eom") if ids[kind] is not None]},
        template=PromptTemplate("tokenizer.chat_template", jinja) if jinja else None,
        files=[file, *tokenizer_files],
        notes=notes,
    )


def _reader(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, OSError) as e:
        raise CompileError(
            STAGE,
            f"GGUF {file}",
            found=f"a file of {file.stat().st_size} bytes that does not parse ({e})",
            expected="a complete GGUF file",
            remedy="it is truncated or damaged: download it again",
        ) from e


def _config(file: Path, get: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of the model, in the keys of Transformers' LlamaConfig."""

    def number(key: str, default: Any = None) -> Any:
        value = get(f"llama.{key}", default)
        if isinstance(value, list) or value is None:
            found = "one value per layer" if value is not None else "nothing"
            raise CompileError(
                STAGE,
                f"metadata llama.{key} of {file}",
                found=found,
                expected="one number",
                remedy="this is not a plain LLaMA; give its Hugging Face checkpoint",
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05 and not 9.999999747378752e-06

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    rotary = number("rope.dimension_count", head_dim)
    if rotary != head_dim or number("attention.value_length", head_dim) != head_dim or number("expert_count", 0):
        raise CompileError(
            STAGE,
            f"metadata of {file}",
            found="partial rotary, uneven heads or experts",
            expected="a plain LLaMA",
            remedy="this variant is not supported",
        )
    if "token_embd.weight" not in shapes:
        raise CompileError(
            STAGE,
            f"GGUF {file}",
            found="no tensor token_embd.weight",
            expected="a whole model",
            remedy="download the file again",
        )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(get),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(get: Any) -> dict[str, Any] | None:
    linear = get("llama.rope.scale_linear")  # files before August 2023
    kind = get("llama.rope.scaling.type", "linear" if linear else "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": get("llama.rope.scaling.factor", linear or 1.0)}
    original = get("llama.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original is not None else {})


def _tensor(file: Path, tensor: Any, config: dict[str, Any]) -> LazyTensor:
    """One tensor of the reader as a LazyTensor that knows where its bytes are."""
    name = _hf_name(file, tensor.name)
    kind = tensor.tensor_type
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if not _can_dequantize(kind) or (len(shape) == 1 and kind.name not in FLOATS):
        raise CompileError(
            STAGE,
            f"tensor {tensor.name} in {file}",
            found=f"type {kind.name}",
            expected="F32, F16, BF16 or a block quantisation of llama.cpp",
            remedy="give a GGUF of another type, or the Hugging Face checkpoint",
        )
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2], 0)
    load = _Loader(file, int(tensor.data_offset), int(tensor.n_bytes) // shape[0], kind, shape[0] // heads if heads else 0)
    return LazyTensor(name, shape, FLOATS.get(kind.name, kind.name.lower()), file, load)


def _hf_name(file: Path, name: str) -> str:
    m = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)", name)
    if m is None or m["part"] not in NAMES:
        remedy = (
            "its rotary frequencies are scaled in a way GGUF does not describe: give the Hugging Face checkpoint"
            if name.startswith("rope_freqs")
            else "this variant of LLaMA is not supported"
        )
        raise CompileError(
            STAGE,
            f"tensor {name} in {file}",
            found="a tensor that a plain LLaMA does not have",
            expected=f"{', '.join(NAMES)}",
            remedy=remedy,
        )
    layer = f"model.layers.{m['layer']}." if m["layer"] else ""
    return f"{layer}{NAMES[m['part']]}.{m['kind']}"


@dataclass(frozen=True)
class _Loader:
    """Reads, and dequantises, the wanted rows only.

    `head_rows` is not 0 for Q and K: llama.cpp interleaves the two halves of every head (its RoPE pairs neighbours), so
    stored row 2*j + i of a head is Hugging Face's row i*head_dim/2 + j (convert_hf_to_gguf.py, LlamaModel.permute).
    """

    file: Path
    offset: int
    row_bytes: int
    kind: Any
    head_rows: int

    def __call__(self, start: int, stop: int) -> npt.NDArray[Any]:
        if not self.head_rows:
            return _dequantize(self._bytes(start, stop), self.kind)
        first = start // self.head_rows * self.head_rows
        last = -(-stop // self.head_rows) * self.head_rows
        wanted = np.arange(start, stop)
        half, j = np.divmod(wanted % self.head_rows, self.head_rows // 2)
        stored = wanted - wanted % self.head_rows + 2 * j + half - first
        return _dequantize(self._bytes(first, last)[stored], self.kind)

    def _bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Stored rows start..stop: uint8 [stop - start, row_bytes]."""
        count = (stop - start) * self.row_bytes
        data = np.fromfile(self.file, np.uint8, count, offset=self.offset + start * self.row_bytes)
        if data.size != count:
            raise CompileError(
                STAGE,
                f"GGUF {self.file}",
                found="a file that became shorter",
                expected="the file the build began with",
                remedy="start the build again",
            )
        return data.reshape(stop - start, self.row_bytes)


def _dequantize(rows: npt.NDArray[np.uint8], kind: Any) -> npt.NDArray[np.float32]:
    """Float32 values of stored rows uint8 [n, row_bytes]."""
    from gguf.quants import dequantize

    values: npt.NDArray[np.float32] = dequantize(rows, kind)
    return values


@lru_cache(maxsize=64)
def _can_dequantize(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES

    try:
        _dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
