"""The list of all packings, and the weights that they make of a checkpoint's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from belle_compile.compiler.checkpoint.packed.awq import Awq
from belle_compile.compiler.checkpoint.packed.base import Module, Packing, Statement
from belle_compile.compiler.checkpoint.packed.compressed_tensors import CompressedTensors
from belle_compile.compiler.checkpoint.packed.gptq import Gptq
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.quantized import QuantizedTensor
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath

_GPTQ = Gptq()
PACKINGS: Mapping[str, Packing] = {packing.method: packing for packing in (_GPTQ, Awq(), CompressedTensors())}
KEYS = ("quantization_config", "compression_config")  # of config.json; the second is compressed-tensors' of before 2024-08
_BESIDE = "quantize_config.json"  # where AutoGPTQ wrote its settings before Transformers knew them
_BIAS = ".bias"


@dataclass(frozen=True)
class Packed:
    """How a checkpoint's weights are packed, and what it says of that."""

    packing: Packing
    stated: Statement
    notes: tuple[str, ...] = ()


def packed_by(config: Mapping[str, Any], file: StoredPath) -> Packed | None:
    """What config.json, which lies in `file`, says of packed weights; None where it says nothing.

    Raises CompileError for a method or a layout that is not read."""
    settings = next((value for key in KEYS if (value := config.get(key))), None)
    beside = file.parent / _BESIDE
    if settings is None and beside.is_file():
        settings, file = {"quant_method": _GPTQ.method} | read_json(beside), beside
    if settings is None:
        return None
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
    packing = PACKINGS.get(method) if isinstance(method, str) else None
    if packing is None:
        title = str(method).upper()
        raise CompileError(
            STAGE,
            f"config {file}",
            found=f"a checkpoint quantised with {title}",
            expected=f"floats, or integers of {', '.join(each.title for each in PACKINGS.values())}",
            remedy=f"quantised {title} checkpoints are not supported: give the one it was made from",
        )
    stated = Statement(settings, file)
    return Packed(packing, stated, tuple(packing.check(stated)))


def without_statements(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of packed weights."""
    return {key: value for key, value in config.items() if key not in KEYS}


def weights_of(
    tensors: Sequence[LazyTensor], packed: Packed | None, file: StoredPath, *, required: bool = False
) -> tuple[list[LazyTensor], list[str]]:
    """The tensors of a checkpoint with one weight for each packed module, and notes.

    Where nothing is said (`packed` None), packed tensors are those of a GPTQ release, whose bits and groups their shapes tell;
    `file` is the place that errors name then. Raises CompileError for tensors that do not belong together and, with
    `required`, where none is packed."""
    packed = packed or Packed(_GPTQ, Statement({}, file))
    modules = _modules(tensors, packed.packing)
    if not modules:
        if not required and not packed.stated.settings:
            return list(tensors), []
        raise CompileError(
            STAGE,
            f"weights of {file}",
            found="no packed weights",
            expected=f"tensors called {' or '.join(packed.packing.marks)}",
            remedy="if these weights are floats, remove the quantization settings, or name the file pytorch_model.bin",
        )
    made = {module.name: _weight(module, packed) for module in modules.values()}
    taken = {f"{module.name}.{part}" for module in modules.values() for part in module.tensors}
    biases = {f"{name}{_BIAS}" for name in made} if packed.packing.spare_biases else set()
    rest = [replace(tensor, spare=tensor.name in biases) for tensor in tensors if tensor.name not in taken]
    kinds = Counter(_kind(tensor.quantized) for tensor in made.values() if tensor.quantized is not None)
    words = "; ".join(f"{count} with {kind}" for kind, count in kinds.items())
    return [*rest, *made.values()], [f"{len(made)} weights are integers of {packed.packing.title}: {words}", *packed.notes]


def _modules(tensors: Sequence[LazyTensor], packing: Packing) -> dict[str, Module]:
    """The modules with packed weights; raises CompileError for a part without the tensor that it belongs to."""
    parts: dict[str, dict[str, LazyTensor]] = {}
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        if part in packing.parts:
            parts.setdefault(module, {})[part] = tensor
    modules = {}
    for name, found in parts.items():
        if found.keys() & set(packing.marks):
            modules[name] = Module(name, found)
        elif alone := [part for part in found if part not in ("weight", "scales")]:
            raise Module(name, found).error(f"{alone[0]} alone", f"{' or '.join(packing.marks)} beside it", found[alone[0]])
    return modules


def _weight(module: Module, packed: Packed) -> LazyTensor:
    quantized = packed.packing.weight(module, packed.stated)
    mark = next(part for part in packed.packing.parts if part in module.tensors)
    stored = module.tensors[mark]
    return LazyTensor(
        f"{module.name}.weight", quantized.shape, f"int{quantized.bits}", stored.file, quantized.rows, stored.steps, quantized
    )


def _kind(quantized: QuantizedTensor) -> str:
    """The bits and the groups of a weight in words."""
    if quantized.group is None:
        return f"{quantized.bits} bits and inputs in an order of their own (act-order)"
    return f"{quantized.bits} bits and a scale for {_reach(quantized)}"


def _reach(quantized: QuantizedTensor) -> str:
    whole = quantized.group == quantized.shape[1]
    return "each output" if whole else f"{quantized.group} inputs of each output"
