"""The files of an adapter, and the names of its tensors, as PEFT saves them."""

from __future__ import annotations

import re

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(?P<end>(?<=vector)\.weight)?"
)
BASE_LAYER = re.compile(r"(\.token_adapter)?\.base_layer(?=\.(weight|bias)$)")
