"""Adapters as PEFT saves them, with random values, and the logits that PEFT computes with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.parity.variants import load_hf

Floats = npt.NDArray[np.float32]
QKV = {"bloom": ["query_key_value"], "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def make_adapter(base: Path, directory: Path, *, seed: int = 0, rows: int | None = None, **config: Any) -> Path:
    """Save an adapter of LoraConfig(**config), every trained value random; `rows` resizes the vocabulary of the base first."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base_model = load_hf(base)
        if rows is not None:
            base_model.resize_token_embeddings(rows)
        model = get_peft_model(base_model, LoraConfig(**settings))
        with torch.no_grad():
            parameters: Iterable[tuple[str, torch.Tensor]] = model.named_parameters()
            for name, parameter in parameters:
                if parameter.requires_grad:
                    parameter.copy_(_trained(name, parameter))
        model.save_pretrained(str(directory))
    return directory


def _trained(name: str, parameter: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(parameter.shape)
    if "magnitude" in name:
        return parameter * (1 + 0.3 * noise)
    scale = 0.5 if "lora_" in name else 1.0
    return scale * noise / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.3 * noise


def peft_logits(base: Path, adapters: Iterable[tuple[Path, float]], ids: Sequence[int], rows: int | None = None) -> Floats:
    """What PEFT computes for one prompt, float32 [len(ids), vocabulary]: the last adapter runs beside the model, the ones
    before it were merged in turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_hf(base)
        if rows is not None:
            model.resize_token_embeddings(rows)
        for directory, scale in adapters:
            if isinstance(model, PeftModel):
                model = model.merge_and_unload()
            model = PeftModel.from_pretrained(model, str(directory)).eval()
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", scale)
        with torch.inference_mode():
            logits: Floats = model(torch.tensor([list(ids)])).logits[0].numpy()
    return logits


def edit_config(directory: Path, **changes: Any) -> Path:
    """Change keys of an adapter_config.json; None removes one."""
    file = directory / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return directory


def edit_tensors(directory: Path, change: Any) -> Path:
    """Replace the tensors of an adapter by what `change` makes of them."""
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return directory
