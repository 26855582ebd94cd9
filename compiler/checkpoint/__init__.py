"""Open BELLE checkpoints: lazy tensors, config, tokenizer, prompt template and generation defaults."""

from belle_compile.compiler.checkpoint.checkpoint import Checkpoint
from belle_compile.compiler.checkpoint.open import open_checkpoint
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import LazyTensor

__all__ = ["Checkpoint", "LazyTensor", "PromptTemplate", "open_checkpoint"]
