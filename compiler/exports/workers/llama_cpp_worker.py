"""Logits of prompts from llama.cpp, by llama-cpp-python; see the package for how it is called."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path


def main() -> None:
    path, longest = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from llama_cpp import Llama

    file = path if path.is_file() else sorted(path.glob("*.gguf"))[0]
    llm = Llama(str(file), n_ctx=longest + 8, n_batch=512, logits_all=True, verbose=False)
    answers.write(struct.pack("<qq", 0, 0))
    answers.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        llm.reset()
        llm.eval(ids)
        logits = llm.scores[: len(ids)]
        answers.write(struct.pack("<qq", *logits.shape))
        answers.write(logits.astype("float32").tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
