"""Logits of prompts from ONNX Runtime, by the inputs and outputs that ONNX Runtime GenAI uses; see the package for how it is
called. The cache is empty before each prompt."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import numpy as np
    import onnxruntime

    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    inputs = config["inputs"]
    session = onnxruntime.InferenceSession(str(folder / config["filename"]), providers=["CPUExecutionProvider"])
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    pasts = [
        inputs[key] % layer for layer in range(config["num_hidden_layers"]) for key in ("past_key_names", "past_value_names")
    ]
    answers.write(struct.pack("<qq", 0, 0))
    answers.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        feeds = {name: np.zeros((1, shapes[name][1], 0, shapes[name][3]), np.float32) for name in pasts}
        feeds[inputs["input_ids"]] = np.array([ids], np.int64)
        feeds[inputs["attention_mask"]] = np.ones((1, len(ids)), np.int64)
        (logits,) = session.run([config["outputs"]["logits"]], feeds)[0]
        answers.write(struct.pack("<qq", *logits.shape))
        answers.write(logits.astype("float32").tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
