"""Measure the effects of each pass on a graph: bytes of weights, kernel calls, and drift of the logits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.backends import Backend
from belle_compile.compiler.ir.cache import BLOCK_SIZE, PagedCache
from belle_compile.compiler.ir.evaluate import stepwise
from belle_compile.compiler.ir.lazy import keeping
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.compiler.report.data import Drift, Effects, Stage
from belle_compile.runtime.sentencepiece_rule import load

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

FRONTEND = "frontend"
TOKENS = 48  # length of the sequence that drift is measured on
MOST_PARAMETERS = 20_000_000  # drift is measured by default in models of up to this size
_KEPT_BYTES = 256 << 20  # bytes of cached weights from which other weights are computed
_TEXT = (
    "写一首关于春天的诗。The capital of France is Paris, and the capital of Japan is Tokyo. 一加一等于二，二加二等于四。"
    "def double(x): return 2 * x. 今天天气很好，我们一起去公园散步吧。"
)


class Step(Protocol):
    """The part of a pass that an observer reads."""

    @property
    def name(self) -> str: ...


class Result(Protocol):
    """The part of a pass's result that an observer reads: the number of places that it changed."""

    @property
    def changes(self) -> int: ...


def pass_effects(backend: Backend, tokenizer_json: str, parameters: int, wanted: bool | None = None) -> PassEffects:
    """Make an observer of a pipeline that counts kernel calls of a backend and, if `wanted`, measures drift on the first tokens
    of a fixed text.

    By default (None) drift is measured for models of up to `MOST_PARAMETERS`, because each stage costs a run in NumPy."""
    if wanted is False:
        return PassEffects(backend, unmeasured="not measured: built with --no-drift")
    if wanted is None and parameters > MOST_PARAMETERS:
        most = f"{MOST_PARAMETERS / 1e6:.0f} M parameters"
        why = f"by default only up to {most}, as it takes a run of the model for each pass; build with --drift to have it"
        return PassEffects(backend, unmeasured=f"not measured: {why}")
    encoding = load(tokenizer_json).encode(_TEXT, add_special_tokens=False)
    return PassEffects(backend, encoding.ids)


class PassEffects:
    """Observer of one pipeline. If there are tokens to measure drift on, it keeps a copy of each graph, which holds no values
    of weights, until `result` runs them."""

    def __init__(self, backend: Backend, tokens: Sequence[int] = (), unmeasured: str = "not measured") -> None:
        self._backend = backend
        self._wanted, self._unmeasured = tuple(tokens), unmeasured
        self._stages: list[Stage] = []
        self._graphs: dict[int, ir.Model] = {}  # by stage number, for the stages that changed something

    def observe(self, step: Step | None, model: ir.Model, result: Result | None) -> None:
        """Record the graph after `step`; `step` and `result` are None before the first pass. This is the `on_pass` of a
        pipeline."""
        name, changes = (FRONTEND, None) if step is None or result is None else (step.name, result.changes)
        if changes == 0:
            self._stages.append(replace(self._stages[-1], name=name, changes=0))
            return
        whole = "ranks" not in model.metadata_props
        if self._wanted and whole:
            self._graphs[len(self._stages)] = model.clone()
        calls, lowers = self._backend.kernel_calls(model), self._backend.has_kernels(model)
        self._stages.append(Stage(name, changes, weight_bytes(model), calls, lowers, whole=whole))

    def result(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Effects:
        """Measure drift and return the stages; `on_progress` is called with the elements of weights (read so far, in all)."""
        graphs, self._graphs = self._graphs, {}
        if not graphs:
            return Effects(tuple(self._stages), 0, self._unmeasured)
        tokens = _usable(self._wanted, graphs[0])
        drifts = _drifts(graphs, tokens, on_progress)
        if drifts is None:
            return Effects(tuple(self._stages), 0, "not measured: the model's own logits are not finite")
        latest, stages = drifts[0], []
        for number, stage in enumerate(self._stages):
            latest = drifts.get(number, latest)
            stages.append(replace(stage, drift=latest if stage.whole else None))
        return Effects(tuple(stages), len(tokens), "")


def _drifts(
    graphs: Mapping[int, ir.Model], tokens: Sequence[int], on_progress: Callable[[int, int], None]
) -> dict[int, Drift] | None:
    """The drift of each graph relative to the first, by its number; None if the first graph's logits are not finite."""
    drifts: dict[int, Drift] = {}
    first: Array = np.empty(0)
    p: Floats = np.empty(0)
    for number, logits in logits_of(graphs, tokens, on_progress):
        if not number:
            if not np.isfinite(logits).all():
                return None
            first, p, drifts[0] = logits, _log_softmax(logits), Drift(0.0, 1.0, 0.0)
            continue
        q = _log_softmax(logits)
        kl = float((np.exp(p) * (p - q)).sum()) / len(tokens)
        same = float((p.argmax(-1) == q.argmax(-1)).mean())
        drifts[number] = Drift(max(kl, 0.0), same, float(np.abs(logits - first).max() / np.abs(first).max()))
    return drifts


def logits_of(
    graphs: Mapping[int, ir.Model], tokens: Sequence[int], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[int, Array]]:
    """Iterate over (number, logits [tokens, vocabulary]) of the graphs for one sequence, beginning with the first graph.

    The graphs run side by side, because most weights of a graph are computed from a weight of an earlier one, which is then
    still cached.
    """
    waiting = [_Run(number, stepwise(graph, *_step(graph, tokens)), _elements(graph.graph)) for number, graph in graphs.items()]
    total = sum(run.total for run in waiting)
    with keeping(_KEPT_BYTES):
        while waiting:
            run = min(waiting, key=lambda run: run.done / max(run.total, 1))
            try:
                run.done += _elements([next(run.nodes)])
                on_progress(total - sum(run.total - run.done for run in waiting), total)
            except StopIteration as end:
                waiting.remove(run)
                yield run.number, end.value["logits"]


@dataclass
class _Run:
    """A graph that is being run, with the number of its weight elements (`total`) and of those read so far (`done`)."""

    number: int
    nodes: Generator[ir.Node, None, dict[str, Array]]
    total: int
    done: int = 0


def _elements(nodes: Iterable[ir.Node]) -> int:
    """The number of elements of the matrices that nodes read; vectors, which differ more between graphs, are not counted."""
    read = (value.const_value for node in nodes for value in node.inputs if value is not None)
    return sum(tensor.size for tensor in read if tensor is not None and len(tensor.shape) > 1)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers that a graph reads."""
    read = (value for value in model.graph.initializers.values() if value.uses())
    return sum(value.const_value.nbytes for value in read if value.const_value is not None)


def _step(model: ir.Model, tokens: Sequence[int]) -> tuple[dict[str, Array], PagedCache]:
    """Inputs of a step for one sequence, and a float32 KV cache for it."""
    cached = [attributes_of(node) for node in model.graph if node.op_type == "Attention"]
    kv_heads, head_dim = (cached[0][key] if cached else 1 for key in ("num_kv_heads", "head_dim"))
    count = len(tokens)
    blocks = -(-count // BLOCK_SIZE)
    places = np.arange(count, dtype=np.int32)
    inputs: dict[str, Array] = {
        "token_ids": np.asarray(tokens, np.int32),
        "positions": places,
        "sequences": np.zeros(count, np.int32),
        "block_table": np.arange(blocks, dtype=np.int32)[None],
        "logit_rows": places,
    }
    layers = 1 + max((attributes["layer"] for attributes in cached), default=0)
    return inputs, PagedCache(layers, kv_heads, head_dim, blocks)


def _usable(tokens: Sequence[int], model: ir.Model) -> tuple[int, ...]:
    """The first of the tokens that are in the vocabulary, as many as fit the context; if fewer than two are, other valid
    tokens."""
    shape = model.graph.outputs[0].shape
    assert shape is not None and isinstance(shape[1], int)
    vocabulary, most = shape[1], min(TOKENS, int(model.metadata_props.get("max_position", TOKENS)))
    known = [token for token in tokens if token < vocabulary]
    return tuple(known[:most]) if len(known) > 1 else tuple(7919 * place % vocabulary for place in range(most))


def _log_softmax(logits: Array) -> Floats:
    shifted: Floats = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
