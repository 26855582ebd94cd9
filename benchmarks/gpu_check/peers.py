"""What torch and Transformers reach on the same GPU: int8 and fp16 products, fp16 and compiled int8 decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

BATCHES, CONTEXT, STEPS, ROWS = (1, 32), 128, 32, 2048


def measure(
    config: dict[str, Any], *, device: str = "cuda", rows: int = ROWS, batches: tuple[int, ...] = BATCHES
) -> dict[str, Any]:
    """By name; what is not installed is named, not measured."""
    try:
        import torch
    except ImportError as error:
        return {"unmeasured": str(error)}
    found: dict[str, Any] = {"torch": torch.__version__, "products": _products(torch, config, device, rows)}
    for name, make in (("transformers fp16 eager", _transformers), ("torch.compile int8 weight-only", _compiled)):
        try:
            for batch in batches:
                step = make(torch, config, batch, device)
                seconds = _decode(torch, step, device)
                found[f"{name}, batch {batch}"] = {"seconds": seconds, "tokens_per_second": batch / seconds}
                del step
        except ImportError as error:
            found[name] = {"unmeasured": str(error)}
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _products(torch: Any, config: dict[str, Any], device: str, rows: int) -> dict[str, dict[str, float]]:
    """Operations a second of `rows` tokens with each weight of a layer."""
    hidden = config["hidden_size"]
    found = {}
    for outputs, inputs in ((3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)):
        x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)
        w = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        other = w.t().contiguous()
        half_x, half_w = x.half() / 64, w.half() / 64
        operations = 2 * rows * outputs * inputs
        int8 = min(_seconds(torch, device, partial(torch._int_mm, x, b)) for b in (w.t(), other))
        half = _seconds(torch, device, partial(torch.matmul, half_x, half_w.t()))
        found[f"{outputs}x{inputs}"] = {"int8_ops": operations / int8, "fp16_ops": operations / half}
    return found


def _seconds(torch: Any, device: str, run: Callable[[], Any]) -> float:
    """The median of a few runs after the first ones."""
    times = []
    for _ in range(15):
        _wait(torch, device)
        started = time.perf_counter()
        for _ in range(10):
            run()
        _wait(torch, device)
        times.append((time.perf_counter() - started) / 10)
    return statistics.median(times[3:])


def _wait(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _decode(torch: Any, step: Callable[[], Any], device: str) -> float:
    """Median seconds of a step, synchronized as sampling would."""
    times = []
    with torch.inference_mode():
        for _ in range(STEPS + 8):
            started = time.perf_counter()
            step()
            _wait(torch, device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[8:])


def _transformers(torch: Any, config: dict[str, Any], batch: int, device: str) -> Callable[[], Any]:
    """A greedy step of Transformers' model of this shape, random weights, after a prompt."""
    from transformers import BloomConfig, BloomForCausalLM

    names = ("hidden_size", "n_layer", "n_head", "vocab_size")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = BloomForCausalLM(BloomConfig(**{name: config[name] for name in names})).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.inference_mode():
        out = model(torch.randint(5, 250, (batch, CONTEXT), device=device), use_cache=True)
    state = {"past": out.past_key_values, "tokens": out.logits[:, -1:].argmax(-1)}

    def step() -> None:
        out = model(state["tokens"], past_key_values=state["past"], use_cache=True)
        state.update(past=out.past_key_values, tokens=out.logits[:, -1:].argmax(-1))

    return step


def _compiled(torch: Any, config: dict[str, Any], batch: int, device: str) -> Callable[[], Any]:
    """The loop that PyTorch's own examples make fast: int8 weights with a scale for each output, a fixed cache, CUDA graphs."""
    half = torch.float16 if device == "cuda" else torch.float32
    hidden, heads, layers, vocab = (config[name] for name in ("hidden_size", "n_head", "n_layer", "vocab_size"))
    length, width = CONTEXT + STEPS + 16, hidden // heads
    functional = torch.nn.functional

    def linear(outputs: int, inputs: int) -> tuple[Any, Any]:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        return weight, torch.full((outputs,), 1e-4, dtype=half, device=device)

    def apply(x: Any, layer: tuple[Any, Any]) -> Any:
        return functional.linear(x, layer[0].to(x.dtype)) * layer[1]

    sizes = ((3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden))
    weights = [[linear(*size) for size in sizes] for _ in range(layers)]
    head, table = linear(vocab, hidden), torch.zeros((vocab, hidden), dtype=half, device=device)
    caches = [torch.zeros((2, batch, heads, length, width), dtype=half, device=device) for _ in range(layers)]
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)], dtype=half, device=device)
    places = torch.arange(length, device=device)

    def forward(tokens: Any, position: Any) -> Any:
        x = functional.embedding(tokens, table)
        bias = slopes[None, :, None, None] * places[None, None, None, :].to(half)
        bias = bias.masked_fill(places[None, None, None, :] > position, float("-inf"))
        for (qkv, dense, up, down), cache in zip(weights, caches, strict=True):
            q, k, v = apply(functional.layer_norm(x, (hidden,)), qkv).view(batch, 1, 3, heads, width).transpose(1, 3).unbind(2)
            cache[0].index_copy_(2, position, k)
            cache[1].index_copy_(2, position, v)
            y = functional.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=bias.expand(batch, -1, -1, -1))
            x = x + apply(y.transpose(1, 2).reshape(batch, 1, hidden), dense)
            x = x + apply(functional.gelu(apply(functional.layer_norm(x, (hidden,)), up), approximate="tanh"), down)
        return apply(functional.layer_norm(x, (hidden,)), head)[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    state = {"tokens": torch.full((batch, 1), 7, device=device), "position": torch.tensor([CONTEXT], device=device)}

    def step() -> None:
        state["tokens"] = compiled(state["tokens"], state["position"]).clone()
        state["position"] = state["position"] + 1

    return step
