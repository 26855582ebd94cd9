"""Families: they build the graph from a checkpoint's config and tensors. An architecture is one module and one line here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from belle_compile.compiler.families import bloom, internlm2, llama, minicpm, mistral, qwen2, qwen3, registry
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.layers import Layers
from belle_compile.compiler.families.registry import register
from belle_compile.compiler.ir.build import GraphBuilder

if TYPE_CHECKING:
    from belle_compile.compiler.checkpoint import Checkpoint

__all__ = ["Family", "build_graph", "register", "registry"]

register(bloom.FAMILY)
register(llama.FAMILY)
register(internlm2.FAMILY)
register(minicpm.FAMILY)
register(mistral.FAMILY)
register(qwen2.FAMILY)
register(qwen3.FAMILY)


def build_graph(checkpoint: Checkpoint) -> ir.Model:
    """Build the float32 graph of a checkpoint and verify it; weights stay lazy, and only a tied head is read.

    Raises CompileError for a key of config.json that asks for something the graph would not compute, and for tensors that are
    missing, have another shape, or are left over.
    """
    family = registry.by_name(checkpoint.family, checkpoint.path)
    config = family.read_config(checkpoint.config)
    builder = GraphBuilder(family.name)
    layers = Layers(checkpoint, builder, partial(family.part_of, config))
    logits = family.build(layers, config)
    layers.check_all_taken()
    return builder.finish(logits, {"family": family.name} | config.metadata)
