"""The record that describes an architecture to the compiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import onnx_ir as ir

from belle_compile.compiler.families.config import Keys
from belle_compile.compiler.families.gguf import GgufLayout
from belle_compile.compiler.families.layers import Layers, Part
from belle_compile.compiler.families.model_config import ModelConfig
from belle_compile.compiler.families.release import Release

C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Family(Generic[C]):
    """An architecture: how its checkpoints are recognised and read, and how its graph is built.

    `name` is its model_type in config.json, the family in the engine's manifest, and the name of its graph; `title` is its name
    in messages. `architectures` are class names in Transformers, by which old releases without a model_type are recognised;
    `aliases` are other model_types. Letter case does not matter in any of them.

    `read_config` reads config.json and raises CompileError for what the graph would not compute. `build(layers, config)`
    appends the model to the graph that `layers` adds to, from the step's inputs to the logits, which it returns.

    `embedding` is the module of the token embedding, by the name that `build` gives it.

    `renames` make a stored tensor name canonical, which is the name that `build` asks for: each is a regular expression and
    the replacement of its first match, applied one after the other. They must leave canonical names as they are.

    `part_of(config, name)` says of which stored tensor the one with this canonical name is a part, where checkpoints may pack
    several into one.

    `template` is the prompt template for checkpoints without one, in a form that --template accepts: a name, Jinja text, or a
    format with {x}. If it is empty, such a checkpoint is refused. `template_by_vocabulary` holds the templates of releases that
    differ from others only in the size of their vocabulary.

    `keys` says which keys of config.json are known; a key that it reads cannot be ignored on request.

    `gguf` describes the family's GGUF files; None if they are not supported. `release` describes the files that Transformers
    loads; None if the family cannot be exported.
    """

    name: str
    title: str
    read_config: Callable[[Mapping[str, Any]], C]
    build: Callable[[Layers, C], ir.Value]
    embedding: str
    architectures: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    part_of: Callable[[C, str], Part | None] = lambda config, name: None
    template: str = ""
    template_by_vocabulary: Mapping[int, str] = field(default_factory=dict)
    keys: Keys = field(default_factory=Keys)
    gguf: GgufLayout | None = None
    release: Release | None = None

    @property
    def names(self) -> frozenset[str]:
        """All names by which a config.json may identify this family, in lower case."""
        return frozenset(name.lower() for name in (self.name, *self.aliases, *self.architectures))

    def canonical_name(self, stored: str) -> str:
        """The name by which `build` asks for a tensor."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored, count=1)
        return stored
