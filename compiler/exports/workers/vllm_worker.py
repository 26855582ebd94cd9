"""Logits of prompts from vLLM; see the package for how it is called."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    model, longest = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what vLLM prints must not come between answers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that logits can be taken where they are computed
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of the function that apply_model is given, in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model), enforce_eager=True, enable_prefix_caching=False, max_num_seqs=1, seed=0,
        max_model_len=longest + 1, max_num_batched_tokens=max(longest + 1, 2048), disable_log_stats=True,
    )  # fmt: skip
    captured: list[Any] = []

    def capture(module: Any) -> None:
        compute = module.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> Any:
            logits = compute(*arguments, **named)
            captured.append(logits.detach().float().clone())
            return logits

        module.compute_logits = compute_logits

    llm.apply_model(capture)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    answers.write(struct.pack("<qq", 0, 0))
    answers.flush()
    for line in sys.stdin:
        ids = json.loads(line)
        captured.clear()
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        last, *before = captured  # those of the sampled token first, then those of the prompt's other tokens
        rows = [row for part in before for row in part[: len(ids) - 1]] + [last[-1]]
        if len(rows) != len(ids):
            raise SystemExit(f"vLLM computed {len(rows)} rows of logits for {len(ids)} tokens")
        answers.write(struct.pack("<qq", len(rows), rows[0].numel()))
        for row in rows:
            answers.write(row.numpy().tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
