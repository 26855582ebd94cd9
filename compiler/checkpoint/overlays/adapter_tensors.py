"""The tensors of an adapter's file, by the modules that they change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from belle_compile.compiler.checkpoint.formats.pickles import PICKLES
from belle_compile.compiler.checkpoint.formats.safetensors import SAFETENSORS
from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, STAGE, LazyTensor, require_float
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.runtime.adapters import names

# The files of weights in PEFT's order, and what opens each.
WEIGHTS = ((names.WEIGHTS, SAFETENSORS), (names.PICKLED_WEIGHTS, PICKLES))
# Of a table in a vocabulary that was resized, PEFT saves these beside the one that it loads.
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.(weight|bias)$)")
_FOREIGN = re.compile(r"(^|\.)(lora_\w+|modules_to_save|token_adapter|original_module|_orig_mod|default)(\.|$)")
_AGAIN = "save the adapter again with save_pretrained of PEFT"


@dataclass
class AdapterTensors:
    """The tensors of a file. `parts` are those of changes: by module, then by what PEFT calls them ("lora_A.weight");
    `replaced` are weights and biases that take the place of the base's, by their names in Transformers."""

    parts: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)


def weights_of(directory: StoredPath) -> StoredPath:
    """The file with the weights of an adapter; raises CompileError if there is none."""
    for name, _ in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    expected = " or ".join(name for name, _ in WEIGHTS)
    raise CompileError(
        STAGE, f"adapter {directory}", found="no weights", expected=expected, remedy="download the whole adapter"
    )


def read_tensors(file: StoredPath) -> AdapterTensors:
    """Open the file with an adapter's weights, by its headers; raises CompileError if it is damaged, empty, or has tensors that
    are no part of a LoRA adapter as PEFT saves it."""
    tensors = dict(WEIGHTS)[file.name].opener()(file)
    if not tensors:
        found = "no tensors, as of a script that saved the state of the model after PEFT had taken its own"
        raise CompileError(STAGE, f"weights {file}", found=found, expected="the weights of an adapter", remedy=_AGAIN)
    return _grouped(tensors)


def _grouped(tensors: Sequence[LazyTensor]) -> AdapterTensors:
    result, stored = AdapterTensors(), {tensor.name for tensor in tensors}
    for tensor in tensors:
        name = names.BASE_LAYER.sub("", tensor.name.removeprefix(names.PREFIX))
        if name.endswith(DERIVED_BUFFERS) or (_COPY.search(tensor.name) and _COPY.sub("", tensor.name) in stored):
            continue
        if not tensor.name.startswith(names.PREFIX):
            raise _unknown(tensor, f"a name that begins with {names.PREFIX}")
        require_float(tensor)
        if match := names.PART.fullmatch(name):
            result.parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif _FOREIGN.search(name) or not name.endswith((".weight", ".bias")):
            raise _unknown(tensor, "the parts of LoRA, and whole weights and biases")
        else:
            result.replaced[name] = tensor
    return result


def _unknown(tensor: LazyTensor, expected: str) -> CompileError:
    return CompileError(
        STAGE, f"tensor of adapter {tensor.file}", found=tensor.name, expected=f"{expected}, as PEFT saves them", remedy=_AGAIN
    )
