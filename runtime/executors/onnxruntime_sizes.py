"""The name of the model's file, and the sizes of a step under ONNX Runtime, which builds need for estimates of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import blocks_for

STAGE = "onnxruntime"  # of errors
MODEL_NAME = "model.onnx"
STEP_TOKENS, STEP_ROWS, STEP_SEQUENCES = 512, 64, 64
# Tokens of a prompt in one run. Attention computes the scores of all of them with all keys up to the last one, so that shorter
# runs compute less; but each run reads the weights.
CHUNK_TOKENS = 128
CUDA = "cuda"  # instruction set of engines for GPUs, whose kernels ONNX Runtime chooses by itself
_VALUES_KEPT = 6  # values of one layer that are alive at the same time


def activation_bytes(facts: Mapping[str, int], score_bytes: int, positions: int, rows: int) -> int:
    """An estimate of what ONNX Runtime allocates: it keeps some values of the widest layer of a chunk at a time, the scores of
    its attention, and logits of `rows` rows, twice. `facts` are the numbers of the model's metadata, `positions` those that a
    score is computed for, each in `score_bytes` bytes."""
    widest = max(facts["intermediate_size"], 2 * facts["hidden_size"])
    scores = facts["num_heads"] * positions * score_bytes
    return CHUNK_TOKENS * (4 * _VALUES_KEPT * widest + scores) + 8 * rows * facts["vocab_size"]


@dataclass(frozen=True)
class Run:
    """The shape of a run on a GPU: `tokens` tokens for each of `sequences` sequences, and `rows` rows of logits."""

    sequences: int
    tokens: int
    rows: int


# On a GPU, a sequence that runs has memory for the longest one; and each kind of run has one shape, so that a token is always
# computed by the same kernels.
GPU_SEQUENCES = 8
MOST_GPU_CONTEXT = 2048  # tokens of the longest sequence, whatever the model's own limit is
ANSWERS, PROMPTS = Run(GPU_SEQUENCES, 1, GPU_SEQUENCES), Run(1, CHUNK_TOKENS, GPU_SEQUENCES)
_GPU_SCORE_BYTES = 16  # scores in float32 with their softmax, and the biases of ALiBi in float32 and in float16


def gpu_context(max_position: int) -> int:
    """Tokens of the longest sequence on a GPU of a model with that many positions, in whole blocks."""
    return min(blocks_for(max_position) * BLOCK_SIZE, MOST_GPU_CONTEXT)


def gpu_capacity(context: int) -> int:
    """The positions of a slot: behind the longest sequence there is room for the tokens that fill up a run."""
    return context + CHUNK_TOKENS


def gpu_activation_bytes(facts: Mapping[str, int]) -> int:
    """An estimate of what ONNX Runtime allocates on a GPU."""
    positions = gpu_capacity(gpu_context(facts["max_position"]))
    return activation_bytes(facts, _GPU_SCORE_BYTES, positions, ANSWERS.rows)
