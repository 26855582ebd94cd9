"""The kernels that a plan consists of, by kind.

TensorRT's inspector needs the plan to be loaded on a GPU. But the plan of TensorRT for RTX, which compiles kernels on the
serving host, describes each profile as text: the tensors with their types, and the kernels in the order of their calls. This
format is not documented, so what does not look as expected is reported as unknown.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from belle_compile.runtime.executors.tensorrt_plan import LayerReport

_BEGIN = re.compile(rb"header \{\n")
_END = re.compile(rb"[^\x1f\x20-\x7e\n\t]")
_PROGRAM = "\nshape_main {"  # only the text of a profile has it, not that of a fused kernel
_TENSOR = re.compile(r'^ +(?:sub_)?tensor=\{.* name="([^"]+)" .* type=(\w+) \}$', re.MULTILINE)
_CALL = re.compile(r"^ {2}(\w+)=\{ name=(.*)$", re.MULTILINE)
_INPUTS = re.compile(r"\binput(?:_args)?=\{([^}]*)\}")
_QUOTED = re.compile(r'"([^"]+)"')
_ATTENTION = re.compile(r"_ge(?:mm|mv)_mha")


def inspected_layers(inspected: str) -> dict[str, int]:
    """The numbers of layers of each kind in the inspector's JSON, which has them for both profiles together; empty where it is
    not of the form that TensorRT documents."""
    try:
        plain = json.loads(inspected)
        return dict(sorted(Counter(str(layer["LayerType"]) for layer in plain["Layers"]).items()))
    except (ValueError, TypeError, KeyError):
        return {}


def layer_reports(plan: bytes | memoryview, profiles: int) -> tuple[LayerReport, ...] | None:
    """The reports of the profiles of a plan, in their order; None where the plan does not have a text for each."""
    texts = [text for begin in _BEGIN.finditer(plan) if _PROGRAM in (text := _text(plan, begin.start()))]
    reports = tuple(_report(text) for text in texts)
    return reports if len(reports) == profiles and all(report.total for report in reports) else None


def _text(plan: bytes | memoryview, start: int) -> str:
    end = _END.search(plan, start)
    return bytes(plan[start : end.start() if end else len(plan)]).decode("ascii")


def _report(text: str) -> LayerReport:
    types = dict(_TENSOR.findall(text))
    counts: Counter[str] = Counter()
    for op, rest in _CALL.findall(text[text.find("\n label ") :]):
        inputs = _INPUTS.search(rest)
        read = [types.get(name, "") for name in _QUOTED.findall(inputs[1])] if inputs else []
        counts[_kind(op, rest, read)] += 1
    return LayerReport(**{name: counts[name] for name in LayerReport.__dataclass_fields__})


def _kind(op: str, rest: str, read: list[str]) -> str:
    """The field of `LayerReport` that counts a call which reads tensors of these types."""
    if op == "fully_connected" or "backbone=gemm" in rest:
        integers = read.count("int8")
        return "int8_products" if integers > 1 else "int8_weight_products" if integers else "float_products"
    return "attention" if _ATTENTION.search(rest) else "other"
