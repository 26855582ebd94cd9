"""The header of weights.safetensors, which follows from the tensors before any of them is packed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from belle_compile.compiler.backends.base import PackedTensor, tensor_bytes
from belle_compile.runtime.program import ALIGNMENT

_SAFETENSORS_NAMES = {
    "int8": "I8", "uint8": "U8", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "float32": "F32", "int64": "I64",
}  # fmt: skip


def weights_header(tensors: Sequence[PackedTensor]) -> bytes:
    """The header of a file of these tensors, in this order, with its length before it; padded to a multiple of 64 bytes."""
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for tensor in tensors:
        size = tensor_bytes(tensor)
        if size % ALIGNMENT or not size or tensor.name in entries:
            raise AssertionError(f"{tensor.name}: {size} bytes, or its name, cannot go into an aligned file")
        entries[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
