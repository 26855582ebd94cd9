"""Opens BELLE checkpoints: lazy tensors, config, tokenizer, prompt template and generation defaults."""

from compiler.checkpoint.checkpoint import Checkpoint
from compiler.checkpoint.open import open_checkpoint
from compiler.checkpoint.templates import PromptTemplate
from compiler.checkpoint.tensors import LazyTensor

__all__ = ["Checkpoint", "LazyTensor", "PromptTemplate", "open_checkpoint"]
