"""Logits of prompts from ONNX Runtime GenAI; see the package for how it is called."""

from __future__ import annotations

import json
import os
import struct
import sys


def main() -> None:
    folder, longest = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import numpy as np
    import onnxruntime_genai

    model = onnxruntime_genai.Model(folder)
    answers.write(struct.pack("<qq", 0, 0))
    answers.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=longest)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        (logits,) = np.asarray(generator.get_output("logits"), np.float32)  # of one sequence
        if len(logits) != len(ids):
            raise SystemExit(f"ONNX Runtime GenAI computed {len(logits)} rows of logits for {len(ids)} tokens")
        answers.write(struct.pack("<qq", *logits.shape))
        answers.write(logits.tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
