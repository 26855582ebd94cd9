"""The name of the model's file, and the sizes of a step under ONNX Runtime, which builds need for estimates of memory."""

from __future__ import annotations

STAGE = "onnxruntime"  # of errors
MODEL_NAME = "model.onnx"
STEP_TOKENS, STEP_ROWS, STEP_SEQUENCES = 512, 64, 64
# Tokens of a prompt in one run. Attention computes the scores of all of them with all keys up to the last one, so that shorter
# runs compute less; but each run reads the weights.
CHUNK_TOKENS = 128
