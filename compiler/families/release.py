"""The layout in which Transformers stores a family, where it differs from the family's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True)
class Release:
    """The mapping from a family's graph to files that Transformers loads as its first architecture.

    The module `NAME` of the graph is stored as `prefix` + NAME; the head has no prefix. `norm` is the op of the architecture's
    norms. The modules whose names end with one of `grouped` hold all q, all k, all v in the graph, and q, k and v of one head
    after another in the files. `config` makes config.json from the one that a checkpoint had, in keys that all versions read.
    `config_of_graph` makes one from the graph of an engine and the dimensions in its manifest, without tokens and tied head.
    `architecture` and `model_type` are those of the files where they are written as another family (empty: the family's own).
    `tied_only` maps names of formats whose runtimes load no head of its own for this architecture to the reason.
    """

    norm: str
    architecture: str = ""
    model_type: str = ""
    prefix: str = ""
    grouped: tuple[str, ...] = ()
    config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    config_of_graph: Callable[[ir.Graph, Mapping[str, int]], dict[str, Any]] = lambda graph, dimensions: {}
    tied_only: Mapping[str, str] = field(default_factory=dict)
