"""Types of the KV cache: one record each, from which choices, help and the manifest's descriptions are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KVType:
    """A type that keys and values are stored in. `manifest` describes it in manifests. `summary` describes it in the command
    line's help, and is empty where the name is enough."""

    name: str
    manifest: str
    summary: str = ""


KV_TYPES: Mapping[str, KVType] = {
    kind.name: kind
    for kind in (
        KVType("float32", "float32"),
        KVType("bfloat16", "bfloat16"),
        KVType("float16", "float16"),
        KVType("int8", "int8 per token and head", "half of 16 bits, with a scale per token and head"),
    )
}
AUTO = "auto"  # a build chooses one of the types
AUTO_SUMMARY = "16 bits (bfloat16 on CPUs, float16 on GPUs), or float32 with --quant none"
KV_CHOICES = (AUTO, *KV_TYPES)
