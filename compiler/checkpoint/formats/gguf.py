"""GGUF files: a Hugging Face config made from the metadata, and tensors that are dequantised row by row when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.formats.gguf_blocks import BLOCK_FORMATS, GROUP, BlockFormat
from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import SENTENCEPIECE, gguf_tokenizer
from belle_compile.compiler.checkpoint.formats.huggingface import rows_of
from belle_compile.compiler.checkpoint.lfs import refuse_pointer
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor, changed
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import registry
from belle_compile.compiler.families.gguf import GgufHeader, GgufLayout
from belle_compile.compiler.ir.quantized import QuantizedRows, QuantizedTensor

if TYPE_CHECKING:
    from gguf import GGUFReader

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Weights of other formats: a directory that has some of these beside a .gguf file is read in their format.
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class Gguf:
    """A .gguf file, alone or in a directory that has no other weights; it holds config and tokenizer too."""

    weights = ("*.gguf",)

    def recognises(self, files: Files) -> bool:
        return bool(files.matching(*self.weights)) and not any(map(files.matching, OTHER_WEIGHTS))

    def read(self, files: Files) -> Contents:
        file, *others = files.matching(*self.weights)
        if others:
            raise CompileError(
                STAGE,
                f"directory {files.path}",
                found=f"{1 + len(others)} GGUF files",
                expected="one",
                remedy=f"give the path of one of them, such as {file}",
            )
        return open_gguf(file, directory=files.directory)


def open_gguf(file: Path, *, directory: Path | None = None) -> Contents:
    """The contents of a .gguf file; a tokenizer.json in `directory` outranks the tokenizer in the metadata.

    Raises CompileError if the file is damaged, one of several parts, or of a model that is not supported.
    """
    reader = _reader(file)
    meta = {key: field for key, field in reader.fields.items()}

    def get(key: str, default: Any = None) -> Any:
        return meta[key].contents() if key in meta else default

    architecture = get("general.architecture")
    family, layout = registry.by_gguf(architecture, file)
    if (parts := get("split.count", 1)) > 1:
        raise CompileError(
            STAGE,
            f"GGUF {file}",
            found=f"one of {parts} parts",
            expected="one whole file",
            remedy="merge the parts with llama-gguf-split --merge",
        )
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    header = GgufHeader(file, architecture, family.title, get, shapes)
    config = {"model_type": family.name, "architectures": [*family.architectures[:1]], **layout.read_config(header)}
    tensors = [_tensor(header, layout, tensor, config) for tensor in reader.tensors]
    if directory is not None and (directory / "tokenizer.json").is_file():
        tokenizer_json, tokenizer_files, notes, _ = load_tokenizer(directory, rows_of(config))
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
            "add_bos_token": get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model") == SENTENCEPIECE),
        },
        sampling=("general.sampling", _sampling(get)),
        generation={"eos_token_id": [ids[kind] for kind in ("eos", "eot", "eom") if ids[kind] is not None]},
        template=PromptTemplate("tokenizer.chat_template", jinja) if jinja else None,
        files=[file, *tokenizer_files],
        notes=notes,
    )


# Sampling settings of the metadata by their names in generation_config.json; the others keep their own names.
_SAMPLING = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
_SAME_NAME = (
    "top_k top_p min_p sequence xtc_probability xtc_threshold penalty_last_n mirostat mirostat_tau mirostat_eta".split()
)


def _sampling(get: Any) -> dict[str, Any]:
    """The generation settings in the metadata; that there are some means that answers are sampled."""
    names = _SAMPLING | {name: name for name in _SAME_NAME}
    stated = {key: value for name, key in names.items() if (value := get(f"general.sampling.{name}")) is not None}
    exact = {key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in stated.items()}
    return {"do_sample": True, **exact} if stated else {}


def _reader(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    refuse_pointer(file)
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


def _tensor(header: GgufHeader, layout: GgufLayout, tensor: Any, config: dict[str, Any]) -> LazyTensor:
    """Make a LazyTensor of a tensor of the reader; raises CompileError for a type that cannot be dequantized."""
    file, name = header.file, _canonical_name(header, layout, tensor.name)
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
    heads = layout.interleaved(tensor.name, config)
    stored = _StoredRows(file, int(tensor.data_offset), int(tensor.n_bytes) // shape[0], shape[0] // heads if heads else 0)
    steps = (f"{file.name}: {tensor.name}",)
    if (block := BLOCK_FORMATS.get(kind.name)) is None:
        return LazyTensor(name, shape, FLOATS.get(kind.name, kind.name.lower()), file, partial(_floats, stored, kind), steps)
    outputs, inputs = shape
    quantized = QuantizedTensor((outputs, inputs), block.bits, GROUP, partial(_integers, stored, block))
    return LazyTensor(name, shape, kind.name.lower(), file, quantized.rows, steps, quantized)


def _canonical_name(header: GgufHeader, layout: GgufLayout, name: str) -> str:
    canonical = layout.canonical_name(name)
    if canonical is None:
        remedy = (
            "its rotary frequencies are scaled in a way GGUF does not describe: give the Hugging Face checkpoint"
            if name.startswith("rope_freqs")
            else f"this variant of {header.title} is not supported"
        )
        raise CompileError(
            STAGE,
            f"tensor {name} in {header.file}",
            found=f"a tensor that a plain {header.title} does not have",
            expected=f"{', '.join(layout.modules)}",
            remedy=remedy,
        )
    return canonical


@dataclass(frozen=True)
class _StoredRows:
    """Reads rows of a tensor as they are stored: uint8 [rows, row_bytes].

    `head_rows` is the number of rows of a head if llama.cpp interleaves the two halves of every head (its RoPE pairs
    neighbours), as in Q and K of a LLaMA, else 0. Stored row 2*j + i of a head is then Hugging Face's row i*head_dim/2 + j
    (convert_hf_to_gguf.py, LlamaModel.permute).
    """

    file: Path
    offset: int
    row_bytes: int
    head_rows: int

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        if not self.head_rows:
            return self._bytes(start, stop)
        first = start // self.head_rows * self.head_rows
        last = -(-stop // self.head_rows) * self.head_rows
        rows = np.arange(start, stop)
        half, j = np.divmod(rows % self.head_rows, self.head_rows // 2)
        stored = rows - rows % self.head_rows + 2 * j + half - first
        permuted: npt.NDArray[np.uint8] = self._bytes(first, last)[stored]
        return permuted

    def _bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start..stop in the order of the file."""
        count = (stop - start) * self.row_bytes
        data = np.fromfile(self.file, np.uint8, count, offset=self.offset + start * self.row_bytes)
        if data.size != count:
            raise changed(self.file, "a file that became shorter")
        return data.reshape(stop - start, self.row_bytes)


def _floats(stored: _StoredRows, kind: Any, start: int, stop: int) -> npt.NDArray[np.float32]:
    return _dequantize(stored(start, stop), kind)


def _integers(stored: _StoredRows, block: BlockFormat, start: int, stop: int) -> QuantizedRows:
    return block.decoded(stored(start, stop))


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
