"""What a pass is: a frozen dataclass whose fields are its options, and which changes a model in place."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, TypeVar

import onnx_ir as ir

Match = TypeVar("Match")


class Phase(IntEnum):
    """What a pass does to a graph, in the order in which a pipeline does it."""

    CLEANUP = 0  # remove nodes and weights that compute nothing new
    OUTLIERS = 1  # spread outliers or move them into weights, while everything is float32
    QUANTIZATION = 2  # choose integers and scales, and use them
    PARTITION = 3  # make the graph of one rank
    ADAPTERS = 4  # make room for adapters, in the graph of a rank
    FUSION = 5  # make one op of several, in the graph of a rank


@dataclass(frozen=True)
class PassResult:
    """The number of places that a pass changed, and one sentence with the reason for each place that it refused to change."""

    changes: int = 0
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """Changes a model in place; a second run finds nothing left to change."""

    phase: ClassVar[Phase]

    @property
    def name(self) -> str:
        """The name of the class as the manifest writes it: FuseAddNorm is fuse-add-norm."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()

    @property
    def options(self) -> dict[str, Any]:
        """The fields by name, as JSON values (a tuple becomes a list), for the record of the pass in the manifest."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @abstractmethod
    def run(self, model: ir.Model) -> PassResult:
        """Change the model; return how many places were changed and which were refused."""


@dataclass(frozen=True)
class Replacement:
    """New `nodes`, in order, that take the place of `old`; `values` maps each old value to the one that replaces it."""

    old: Sequence[ir.Node]
    nodes: Sequence[ir.Node]
    values: Mapping[ir.Value, ir.Value]


class RewritePass(Pass, Generic[Match]):
    """A pass that visits each node once: `pattern` finds a match, `check` may refuse it, `rewrite` replaces it."""

    @abstractmethod
    def pattern(self, node: ir.Node) -> Match | None:
        """Return the match that this node represents, None where there is none. One node alone represents a match."""

    @abstractmethod
    def check(self, match: Match) -> str:
        """Return why the match must stay unchanged; an empty text where it may be rewritten."""

    @abstractmethod
    def rewrite(self, match: Match, graph: ir.Graph) -> Replacement:
        """Return the nodes that replace the match. Their new weights are registered in the graph here."""

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite every match that `check` accepts, remove weights that nothing reads any more, and sort the nodes."""
        changes, refusals = 0, []
        for node in list(model.graph):
            if node.graph is None:  # replaced together with an earlier node
                continue
            match = self.pattern(node)
            if match is None:
                continue
            reason = self.check(match)
            if reason:
                refusals.append(f"{node.name}: {reason}")
                continue
            apply(self.rewrite(match, model.graph), model.graph)
            changes += 1
        if changes:
            model.graph.sort()
        return PassResult(changes, tuple(refusals))


def apply(replacement: Replacement, graph: ir.Graph) -> None:
    """Put a replacement into the graph; values keep their names, and weights that nothing reads any more are removed."""
    read = {value for node in replacement.old for value in node.inputs if value is not None}
    graph.insert_before(replacement.old[0], replacement.nodes)
    for old, new in replacement.values.items():
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = old.name
    graph.remove(replacement.old, safe=True)
    for value in read:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, so that its tensor is known at compile time."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def other_readers(value: ir.Value, *known: ir.Node) -> list[str]:
    """The readers of a value other than the known nodes: names of nodes, and "the graph's output"."""
    names = [str(node.name) for node in value.consumers() if node not in known]
    return names + (["the graph's output"] if value.is_graph_output() else [])
