"""The canonical names of a checkpoint's tensors, and tensors that are no weights of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, MASKS, STAGE, LazyTensor, is_buffer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family

# Tensors that Transformers ignores when it loads a language model: heads for other tasks (TRL, DeepSpeed-Chat, sequence
# classification), and buffers that are computed from config.json.
_IGNORED = re.compile(
    r"(v_head|value_head|critic_head|reward_head|regression_head|score|classifier|qa_outputs)\..*"
    r"|(.*\.)?(rotary_emb\.(cos_cached|sin_cached|original_inv_freq)|position_ids|causal_mask|masked_bias)"
)
# Parts that wrappers put into names: the pattern, the wrapper, and how to save the model without it.
_UNWRAP = "unwrap the model before saving it: accelerator.unwrap_model(model).save_pretrained(...), or model.module"
_MERGE = "merge the adapter (merge_and_unload) and save the result"
_WRAPPERS = (
    (r"(^|\.)_orig_mod\.", "torch.compile", "save model._orig_mod in place of the compiled model"),
    (r"(^|\.)_fsdp_wrapped_module\.", "FSDP", _UNWRAP),
    (r"(^|\.)_checkpoint_wrapped_module\.", "activation checkpointing", _UNWRAP),
    (r"^_forward_module\.", "Lightning or DeepSpeed", _UNWRAP),
    (r"^module\.", "DistributedDataParallel or DeepSpeed", _UNWRAP),
    (r"^base_model\.model\.", "PEFT", _MERGE),
    (r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|modules_to_save)\.", "PEFT", _MERGE),
    (r"^pretrained_model\.", "TRL", "save model.pretrained_model in place of the model with a value head"),
)
_NAMED = 4  # tensors that a note names


def canonical(tensors: Iterable[LazyTensor], family: Family[Any]) -> tuple[dict[str, LazyTensor], list[str]]:
    """Tensors by the names that the family's graph asks for, and notes on those that were ignored.

    Buffers and heads that Transformers ignores are left out. Raises CompileError for a name that occurs twice, and for names
    that a wrapper has changed: Transformers would not find the weights.
    """
    named: dict[str, LazyTensor] = {}
    ignored: list[str] = []
    for tensor in tensors:
        if tensor.name.endswith(DERIVED_BUFFERS) or MASKS.search(tensor.name):
            continue
        _refuse_wrapper(tensor)
        if _IGNORED.fullmatch(tensor.name) or is_buffer(tensor):
            ignored.append(tensor.name)
            continue
        name = family.canonical_name(tensor.name)
        if name in named:
            raise CompileError(
                STAGE,
                f"tensor {name}",
                found=f"it twice, in {named[name].file.name} and in {tensor.file.name}",
                expected="every tensor once",
                remedy="download the checkpoint again",
            )
        named[name] = replace(tensor, name=name)
    return named, _note(ignored)


def _refuse_wrapper(tensor: LazyTensor) -> None:
    for pattern, wrapper, remedy in _WRAPPERS:
        if match := re.search(pattern, tensor.name):
            raise CompileError(
                STAGE,
                f"tensor {tensor.name} in {tensor.file}",
                found=f"the {'part' if match.start() else 'prefix'} {match[0].removeprefix('.')} of {wrapper}",
                expected="names as save_pretrained writes them",
                remedy=remedy,
            )


def _note(ignored: Sequence[str]) -> list[str]:
    if not ignored:
        return []
    more = f" and {len(ignored) - _NAMED} more" if len(ignored) > _NAMED else ""
    return [f"tensors that Transformers ignores too were left out: {', '.join(ignored[:_NAMED])}{more}"]
