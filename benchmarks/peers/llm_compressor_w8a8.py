"""Quantizes a checkpoint to W8A8 with llm-compressor, in whose environment it runs; it needs nothing of this package.

    python llm_compressor_w8a8.py nearest CHECKPOINT OUT
    python llm_compressor_w8a8.py gptq CHECKPOINT OUT REQUESTS      # SmoothQuant 0.8, then GPTQ, as its examples for W8A8

REQUESTS is JSON Lines of token ids. Floats are stored as float16, the scales of weights as float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    how, source, out, *files = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme: dict[str, Any] = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
    if how == "nearest":
        oneshot(model=model, recipe=QuantizationModifier(**scheme))
    else:
        requests = [json.loads(line)["token_ids"] for line in Path(files[0]).read_text("utf-8").splitlines()]
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in requests]
        oneshot(
            model=model, dataset=Dataset.from_list(rows), num_calibration_samples=len(rows),
            max_seq_length=max(map(len, requests)),
            recipe=[SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**scheme)],
        )  # fmt: skip
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
        elif getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.half()
    model.config.dtype = torch.float16
    model.save_pretrained(out, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(out) / name).write_bytes((Path(source) / name).read_bytes())


if __name__ == "__main__":
    main()
