"""The arithmetic of an INT8 engine in plain torch on a Transformers model: the reference for accuracy, slow and literal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint

Tensor = torch.Tensor


def load_fp32(path: Path) -> Any:
    """The Transformers model of a Hugging Face directory or a LLaMA-family GGUF file, expanded to float32."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(path)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in checkpoint.config.items() if key != "model_type"}))
    state = {name: torch.from_numpy(tensor.read()) for name, tensor in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row as `belle::QuantizeTokens` means it: (integers as float32, absmax/127 per row)."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    return torch.round(x * inverse), absmax / 127.0


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: (integers as float32, scale [outputs])."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.0
    integers = torch.where(scale > 0, torch.round(weight / scale), torch.zeros_like(weight)).clamp(-127, 127)
    return integers, scale[:, 0]


class W8A8Linear(torch.nn.Module):
    """A linear layer with integer products; sums are exact because float64 holds them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        integers, self.scale = quantize_weight(linear.weight.detach())
        self.integers = integers.double()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        xq, xs = quantize_rows(x)
        y = (xq.double() @ self.integers.T).float() * self.scale * xs
        return y if self.bias is None else y + self.bias


class W8Embedding(torch.nn.Module):
    """An embedding table of int8 rows. With `nudge` every value read is changed by about one part in 10 million."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.nudge: torch.Generator | None = None
        self.integers, self.scale = quantize_weight(embedding.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        values = self.integers[ids] * self.scale[ids][..., None]
        return values if self.nudge is None else values * (1 + 1e-7 * torch.randn(values.shape, generator=self.nudge))


class HalfCache(DynamicCache):  # type: ignore[misc]  # the types of transformers are not followed
    """Keys and values are kept in 16 bits: bfloat16, as an INT8 engine keeps them, or another type."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(
            *(states.to(self.dtype).float() for states in (key_states, value_states)), layer_idx, *args, **kwargs
        )


def simulate(model: Any) -> Any:
    """Replace every linear layer and embedding of a Transformers model in place; head and embedding included."""
    for name, module in list(model.named_modules()):
        replacement: torch.nn.Module
        if isinstance(module, torch.nn.Linear):
            replacement = W8A8Linear(module)
        elif isinstance(module, torch.nn.Embedding):
            replacement = W8Embedding(module)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    return model


@torch.inference_mode()
def logits(model: Any, ids: list[int], *, half_cache: bool) -> Tensor:
    """float32 [tokens, vocabulary] of one sequence."""
    cache = HalfCache() if half_cache else DynamicCache()
    return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].float()  # type: ignore[no-any-return]
