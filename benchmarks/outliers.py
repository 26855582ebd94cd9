"""Makes the hard case for INT8: the same model with outliers in a few channels of its activations.

    python -m benchmarks.outliers build/smollm2-outliers

Norm weights of a few channels grow by up to 100 and the weights that read them shrink by as much: the same function in
float32, but activations whose scale per token is that of its outliers (LLaMA family).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint import open_checkpoint
from benchmarks.fetch_smollm2 import fetch

CHANNELS, GREATEST = 6, 100.0
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def make(source: Path, out: Path, seed: int = 0) -> Path:
    """A float32 Hugging Face checkpoint at `out`, of the LLaMA-family checkpoint at `source`; one that is there is kept."""
    from safetensors.numpy import save_file

    if (out / "config.json").is_file():
        return out
    checkpoint = open_checkpoint(source)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.array(tensor.read(), np.float32) for name, tensor in checkpoint.tensors.items()}
    random = np.random.default_rng(seed)
    for name in list(tensors):
        found = re.fullmatch(r"(.*\.)(input_layernorm|post_attention_layernorm)\.weight", name)
        if not found:
            continue
        prefix, norm = found.groups()
        channels = random.choice(len(tensors[name]), CHANNELS, replace=False)
        factors = np.geomspace(10, GREATEST, CHANNELS).astype(np.float32)
        tensors[name][channels] *= factors
        for reader in _READERS[norm]:
            tensors[f"{prefix}{reader}.weight"][:, channels] /= factors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_text(checkpoint.tokenizer_json)
    special = checkpoint.special
    config: dict[str, Any] = checkpoint.config | {"torch_dtype": "float32"}
    tokens = {key: special[key] for key in ("bos_token", "eos_token") if special[key]}
    (out / "tokenizer_config.json").write_text(json.dumps(tokens | {"chat_template": checkpoint.template.jinja}) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make(fetch(Path("build/smollm2")), arguments.out, arguments.seed))


if __name__ == "__main__":
    main()
