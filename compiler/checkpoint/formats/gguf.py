"""GGUF files: a Hugging Face config made from the metadata, and tensors that are dequantised row by row when they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.formats.gguf_blocks import BLOCK_FORMATS, GROUP, BlockFormat
from belle_compile.compiler.checkpoint.formats.gguf_header import FileHeader, StoredTensor, read_header
from belle_compile.compiler.checkpoint.formats.gguf_rows import StoredRows, interleaved_halves, separated_parts, swappable
from belle_compile.compiler.checkpoint.formats.gguf_rules import adds_bos, end_ids, special_id
from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import gguf_tokenizer
from belle_compile.compiler.checkpoint.formats.huggingface import rows_of
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import registry
from belle_compile.compiler.families.gguf import GgufHeader, GgufLayout
from belle_compile.compiler.ir.quantized import QuantizedRows, QuantizedTensor
from belle_compile.compiler.stored_path import StoredPath, by_name

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Weights of other formats: a directory that has some of these beside a .gguf file is read in their format.
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}  # kinds of tokens and their names in the metadata
_NAMED = 12  # files that an error names
_MOST_DIVISORS = 1 << 12  # half of the largest head size


class Gguf:
    """A .gguf file, alone or in a directory that has no other weights; it holds config and tokenizer too."""

    weights = ("*.gguf",)

    def recognises(self, files: Files) -> bool:
        return bool(files.matching(*self.weights)) and not any(map(files.matching, OTHER_WEIGHTS))

    def read(self, files: Files) -> Contents:
        file, *others = first_parts(files.matching(*self.weights))
        if others:
            names = ", ".join(other.name for other in (file, *others[: _NAMED - 1]))
            raise CompileError(
                STAGE,
                f"directory {files.path}",
                found=f"{1 + len(others)} GGUF files: {names}" + (", ..." if len(others) >= _NAMED else ""),
                expected="one",
                remedy=f"give the path of one of them, such as {file}",
            )
        return open_gguf(file, directory=files.directory)


def first_parts(files: Sequence[StoredPath]) -> list[StoredPath]:
    """The files without those that are parts of a model after its first one."""
    first = {part.parent / _part_name(part, 1) for part in files if _PART.fullmatch(part.name)}
    return by_name({*(file for file in files if not _PART.fullmatch(file.name)), *first})


def _part_name(part: StoredPath, number: int) -> str:
    match = _PART.fullmatch(part.name)
    assert match is not None, f"{part} is no part"
    return f"{match['stem']}-{number:05d}-of-{match['count']}.gguf"


def open_gguf(file: StoredPath, *, directory: StoredPath | None = None) -> Contents:
    """The contents of a .gguf file, or of a model in several parts, of which any may be given; a tokenizer.json in `directory`
    outranks the tokenizer in the metadata.

    Raises CompileError if a file is damaged or missing, or of a model that is not supported.
    """
    if _PART.fullmatch(file.name):
        file = file.parent / _part_name(file, 1)
        _require_part(file)
    first = read_header(file)
    get = first.metadata.get
    architecture: Any = get("general.architecture")
    family, layout = registry.by_gguf(architecture, file)
    headers = {file: first, **_other_parts(file, get("split.count", 1))}
    stored = [_Stored(part, tensor, of_part.swapped) for part, of_part in headers.items() for tensor in of_part.tensors]
    if (count := get("split.tensors.count", len(stored))) != len(stored):
        raise _incomplete(file, f"{len(stored)} tensors in {len(headers)} parts", f"{count} tensors")
    header = GgufHeader(file, architecture, family.title, get, {tensor.name: tensor.shape for tensor in stored})
    ids = {f"{kind}_token_id": special_id(get, name) for kind, name in _SPECIAL.items()}
    config = {"model_type": family.name, "architectures": [*family.architectures[:1]], **layout.read_config(header), **ids}
    divisors = [_divisors(tensor) for tensor in stored if tensor.name == layout.rope_divisors]
    config |= {"rope_divisors": divisors[0]} if divisors else {}
    if directory is not None and (directory / "tokenizer.json").is_file():
        tokenizer_json, tokenizer_files, notes, _ = load_tokenizer(directory, rows_of(config))
    else:
        tokenizer_json, notes, tokenizer_files = gguf_tokenizer(file, get), [], []
    packed = sorted({tensor.kind.name for tensor in stored} - set(FLOATS))
    if packed:
        notes.append(f"{file.name} is quantised already ({', '.join(packed)}): its errors add to those of this build")
    words, jinja = get("tokenizer.ggml.tokens", []), get("tokenizer.chat_template")
    special = {key.removesuffix("_id"): words[index] for key, index in ids.items() if index is not None}
    return Contents(
        config=config,
        tensors=[_tensor(header, layout, tensor, config) for tensor in stored if tensor.name != layout.rope_divisors],
        tokenizer_json=tokenizer_json,
        tokenizer_config=special | {"add_bos_token": adds_bos(get)},
        sampling=("general.sampling", _sampling(get)),
        generation={"eos_token_id": end_ids(get)},
        template=PromptTemplate("tokenizer.chat_template", jinja) if jinja else None,
        metadata_of=file.name,
        files=[*headers, *tokenizer_files],
        notes=notes,
    )


@dataclass(frozen=True)
class _Stored:
    """A tensor, the file that it is in, and whether its numbers have the other byte order than this host's."""

    file: StoredPath
    tensor: StoredTensor
    swapped: bool

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def kind(self) -> Any:
        """The GGMLQuantizationType of its values."""
        return self.tensor.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def values(self) -> list[float]:
        """All values of a float32 tensor of one axis."""
        swapped = self.kind.name if self.swapped else ""
        rows = StoredRows(self.file, self.tensor.offset, self.tensor.bytes, swapped=swapped)
        values: list[float] = rows(0, 1).view(np.float32)[0].tolist()
        return values


def _divisors(stored: _Stored) -> list[float]:
    """The values of the tensor that divides the rotary frequencies; raises CompileError if they are not float32 of one axis."""
    if stored.kind.name != "F32" or len(stored.shape) != 1 or stored.shape[0] > _MOST_DIVISORS:
        raise CompileError(
            STAGE,
            f"tensor {stored.name} in {stored.file}",
            found=f"type {stored.kind.name} and shape {list(stored.shape)}",
            expected="F32, one value for each rotary frequency",
            remedy="download the file again",
        )
    return stored.values()


def _other_parts(first: StoredPath, count: Any) -> dict[StoredPath, FileHeader]:
    """The headers of the parts after the first one, by file; raises CompileError if one is missing or of another model."""
    if count in (0, 1):
        return {}
    if (match := _PART.fullmatch(first.name)) is None or int(match["count"]) != count:
        raise _incomplete(first, f"one of {count} parts", f"the name NAME-00001-of-{count:0>5}.gguf")
    headers = {}
    for number in range(2, count + 1):
        part = first.parent / _part_name(first, number)
        _require_part(part)
        header = read_header(part)
        if (stated := header.metadata.get("split.no")) != number - 1:
            raise _incomplete(part, f"split.no {stated}", f"{number - 1}")
        headers[part] = header
    return headers


def _require_part(part: StoredPath) -> None:
    if not part.is_file():
        raise _incomplete(part, "no such file", "every part of the model beside the others")


def _incomplete(file: StoredPath, found: str, expected: str) -> CompileError:
    remedy = "download all parts again, or merge them with llama-gguf-split --merge"
    return CompileError(STAGE, f"GGUF {file}", found=found, expected=expected, remedy=remedy)


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


def _tensor(header: GgufHeader, layout: GgufLayout, stored: _Stored, config: dict[str, Any]) -> LazyTensor:
    """Make a LazyTensor of a stored tensor; raises CompileError for a type that cannot be dequantized."""
    name, kind, shape, file = _canonical_name(header, layout, stored.name), stored.kind, stored.shape, stored.file
    readable = _can_dequantize(kind) and (len(shape) == 2 or kind.name in FLOATS)
    if not readable or (stored.swapped and not swappable(kind.name)):
        raise CompileError(
            STAGE,
            f"tensor {stored.name} in {file}",
            found=f"type {kind.name}" + (" in the byte order of other hosts" if readable else ""),
            expected="F32, F16, BF16 or a block quantisation of llama.cpp",
            remedy="give a GGUF of another type, or the Hugging Face checkpoint",
        )
    order = None
    if heads := layout.interleaved(stored.name, config):
        order = interleaved_halves(_rows_of_head(stored, 2, heads))
    elif heads := layout.separated(stored.name, config):
        order = separated_parts(heads, _rows_of_head(stored, 3, heads) // 3)
    rows = StoredRows(file, stored.tensor.offset, stored.tensor.bytes // shape[0], order, kind.name if stored.swapped else "")
    steps = (f"{file.name}: {stored.name}",)
    if (block := BLOCK_FORMATS.get(kind.name)) is None:
        return LazyTensor(name, shape, FLOATS.get(kind.name, kind.name.lower()), file, partial(_floats, rows, kind), steps)
    outputs, inputs = shape
    quantized = QuantizedTensor((outputs, inputs), block.bits, GROUP, partial(_integers, rows, block))
    return LazyTensor(name, shape, kind.name.lower(), file, quantized.rows, steps, quantized)


def _rows_of_head(stored: _Stored, parts: int, heads: Any) -> int:
    """The rows of a head in a tensor of `heads` heads; raises CompileError unless they can be divided into `parts` parts."""
    rows = stored.shape[0]
    if type(heads) is not int or heads < 1 or rows % (parts * heads):
        raise CompileError(
            STAGE,
            f"tensor {stored.name} in {stored.file}",
            found=f"{rows} rows",
            expected=f"a multiple of {parts} for each of {heads} heads",
            remedy="download the file again",
        )
    return rows // heads


def _canonical_name(header: GgufHeader, layout: GgufLayout, name: str) -> str:
    canonical = layout.canonical_name(name)
    if canonical is None:
        raise CompileError(
            STAGE,
            f"tensor {name} in {header.file}",
            found=f"a tensor that a plain {header.title} does not have",
            expected=f"{', '.join(layout.modules)}",
            remedy=f"this variant of {header.title} is not supported",
        )
    return canonical


def _floats(stored: StoredRows, kind: Any, start: int, stop: int) -> npt.NDArray[np.float32]:
    return _dequantize(stored(start, stop), kind)


def _integers(stored: StoredRows, block: BlockFormat, start: int, stop: int) -> QuantizedRows:
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
