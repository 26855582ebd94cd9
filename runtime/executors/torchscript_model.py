"""The names that a traced module and its executor share."""

from __future__ import annotations

import re
from pathlib import Path

STAGE = "torchscript"
REMEDY = "copy the engine again or rebuild it"
# The tensors that a module takes: memory for activations, the KV cache, and the inputs of a program
INPUTS = ("arena", "cache", "token_ids", "positions", "sequences", "block_table", "logit_rows", "T", "R")


def attribute_of(weight: str) -> str:
    """The module's attribute for a tensor of weights.safetensors."""
    return "weight_" + re.sub(r"\W", "_", weight)


def model_name(library: str) -> str:
    """The file name of the module that calls the operators of a kernel library, such as model-avx512vnni.ts."""
    return Path(library).stem.replace("kernels", "model", 1) + ".ts"
