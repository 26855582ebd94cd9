"""Checkpoints that every engine of a comparison is made from, under PEERS_HOME/models.

    python -m benchmarks.peers.models llama-1b

SmolLM2-135M is its 4-bit GGUF expanded to float32; other shapes are those of benchmarks.checkpoints, with the files that
converters ask for: a tokenizer that all of them can read, and generation_config.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, fetch_smollm2
from benchmarks.engines import SHAPES, SMOLLM2
from benchmarks.peers.home import MODELS, PeersError, check_space, remove
from benchmarks.scaling import step_bytes

TEMPLATE = "chat_template.jinja"
# Tables that are looked up by row, so that decoding does not read them unless they are also the output matrix.
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.word_embeddings.weight")


def make(name: str) -> Path:
    """The checkpoint of a shape; it appears under its name only when it is complete."""
    out = MODELS / name
    if (out / "config.json").is_file():
        return out
    partial = out.with_name(f"{name}.new")
    remove(partial)
    MODELS.mkdir(parents=True, exist_ok=True)
    if name == SMOLLM2:
        check_space(MODELS, 1e9, f"the checkpoint {name}")
        partial.mkdir()
        _expand(fetch_smollm2.fetch(Path("build/smollm2")), partial)
    else:
        check_space(MODELS, 2.4 * step_bytes(checkpoints.SHAPES[name])[0], f"the checkpoint {name}")
        smollm2 = make(SMOLLM2)
        checkpoints.make(name, partial)
        write_tokenizer(smollm2 / "tokenizer.json", partial)
        shutil.copyfile(smollm2 / TEMPLATE, partial / TEMPLATE)  # servers of others answer no chats without one
        config = json.loads((partial / "config.json").read_text())
        _write_generation(partial, config)
    partial.rename(out)
    return out


def weights_read(model: Path) -> int:
    """Weights that one decoding step has to read: all of them, less an embedding table that is not tied."""
    return sum(map(prod, tensor_shapes(model).values())) - untied_embedding(model)


def untied_embedding(model: Path) -> int:
    """Elements of the embedding table where it is not also the output matrix, else 0."""
    shapes = tensor_shapes(model)
    return sum(prod(shapes[name]) for name in EMBEDDINGS if name in shapes and "lm_head.weight" in shapes)


def tensor_shapes(model: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor of a checkpoint, from the headers of its safetensors files."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def write_tokenizer(source: Path, model: Path) -> None:
    """SmolLM2's byte-level BPE cut or filled up to the model's vocabulary: converters refuse a tokenizer without merges."""
    size: int = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    bpe = tokenizer["model"]
    vocab = {token: i for token, i in bpe["vocab"].items() if i < size}
    pairs = [(merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in bpe["merges"]]
    bpe["merges"] = [merge for merge, (a, b) in pairs if a in vocab and b in vocab and a + b in vocab]
    bpe["vocab"] = vocab | {f"<extra_{i}>": i for i in range(len(vocab), size)}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < size]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    _write_json(
        model / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": 2048}
    )


def _expand(gguf: Path, out: Path) -> None:
    """A GGUF as a directory that Transformers reads, in float32."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from belle_compile.compiler.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf)
    tensors = {name: torch.from_numpy(tensor.read()).contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)
    known = {key: value for key, value in checkpoint.config.items() if value is not None}
    more = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "pad_token_id": known["eos_token_id"]}
    config = known | more
    _write_json(out / "config.json", config)
    _write_generation(out, config)


def _write_generation(out: Path, config: Mapping[str, Any]) -> None:
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": config.get("pad_token_id", eos)}
    _write_json(out / "generation_config.json", ids)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    try:
        print(make(parser.parse_args().shape))
    except PeersError as error:
        raise SystemExit(f"peers: {error}.") from None


if __name__ == "__main__":
    main()
