"""What torch and Transformers reach on the same GPU: int8 and fp16 products, fp16 and compiled int8 decoding.

python -m benchmarks.gpu_check.peers CONFIG FINDINGS [--device cpu]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.findings import Findings

BATCHES, CONTEXT, STEPS, ROWS = (1, 32), 128, 32, 2048


def measure(
    config: dict[str, Any], findings: Findings, *, device: str = "cuda", rows: int = ROWS, batches: tuple[int, ...] = BATCHES
) -> None:
    """By name; what is not installed or fails is named, and does not keep the rest from being measured."""
    try:
        import torch
    except ImportError as error:
        findings.note(unmeasured=str(error))
        return
    findings.note(torch=torch.__version__, cuda=torch.version.cuda)
    if device == "cuda" and not torch.cuda.is_available():
        findings.note(unmeasured="this torch sees no GPU")
        return
    work: dict[str, Callable[[], dict[str, float]]] = {
        f"product {outputs}x{inputs}": partial(_product, torch, outputs, inputs, rows, device)
        for outputs, inputs in _layers(config["hidden_size"])
    }
    for name, make in (("transformers fp16 eager", _transformers), ("torch.compile int8 weight-only", _compiled)):
        work |= {f"{name}, batch {batch}": partial(_decoding, torch, make, config, batch, device) for batch in batches}
    if device == "cuda":
        work["transformers fp16 eager, launches"] = partial(_launches, torch, _transformers, config, device)
    for name, run in work.items():
        try:
            findings.note_under(name, run())
        except Exception as error:
            traceback.print_exc()
            findings.note_under(name, {"unmeasured": f"{type(error).__name__}: {error}"[:500]})
        torch.compiler.reset()  # what is compiled holds weights
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _layers(hidden: int) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of a layer's weights."""
    return (3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)


def _product(torch: Any, outputs: int, inputs: int, rows: int, device: str) -> dict[str, float]:
    """Operations a second of `rows` tokens with a weight."""
    x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    other = w.t().contiguous()
    half_x, half_w = x.half() / 64, w.half() / 64
    operations = 2 * rows * outputs * inputs
    int8 = min(_seconds(torch, device, partial(torch._int_mm, x, b)) for b in (w.t(), other))
    half = _seconds(torch, device, partial(torch.matmul, half_x, half_w.t()))
    return {"int8_ops": operations / int8, "fp16_ops": operations / half}


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


def _decoding(torch: Any, make: Callable[..., Callable[[], Any]], config: Any, batch: int, device: str) -> dict[str, float]:
    """Median seconds of a step, synchronized as sampling would."""
    times = []
    with torch.no_grad():
        step = make(torch, config, batch, device)
        for _ in range(STEPS + 8):
            started = time.perf_counter()
            step()
            _wait(torch, device)
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times[8:])
    return {"seconds": seconds, "tokens_per_second": batch / seconds, "first_s": times[0]}


def _launches(torch: Any, make: Callable[..., Callable[[], Any]], config: Any, device: str) -> dict[str, float]:
    """Kernels of a step, by the driver's own record of what ran."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        step = make(torch, config, 1, device)
        step()
        _wait(torch, device)
        with torch.profiler.profile(activities=activities) as profile:
            step()
            _wait(torch, device)
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in ran)
    return {"kernels": len(ran) - copies, "copies": copies}


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
    out = model(torch.randint(5, 250, (batch, CONTEXT), device=device), use_cache=True)
    state = {"past": out.past_key_values, "tokens": out.logits[:, -1:].argmax(-1)}

    def step() -> None:
        out = model(state["tokens"], past_key_values=state["past"], use_cache=True)
        state.update(past=out.past_key_values, tokens=out.logits[:, -1:].argmax(-1))

    return step


def _compiled(torch: Any, config: dict[str, Any], batch: int, device: str) -> Callable[[], Any]:
    """The loop that PyTorch's own examples make fast: int8 weights with a scale for each output, a fixed cache, CUDA graphs,
    and kernels that are tuned as those examples ask for."""
    from torch._inductor import config as inductor

    inductor.coordinate_descent_tuning = True
    half = torch.float16 if device == "cuda" else torch.float32
    hidden, heads, layers, vocab = (config[name] for name in ("hidden_size", "n_head", "n_layer", "vocab_size"))
    length, width = CONTEXT + STEPS + 16, hidden // heads
    functional = torch.nn.functional

    # Buffers of modules stay where they are: CUDA graphs copy other inputs at every step, and refuse those that are written to.
    def module(**buffers: Any) -> Any:
        made = torch.nn.Module()
        for name, value in buffers.items():
            made.register_buffer(name, value)
        return made

    def linear(outputs: int, inputs: int) -> Any:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        return module(weight=weight, scale=torch.full((outputs,), 1e-4, dtype=half, device=device))

    def apply(x: Any, layer: Any) -> Any:
        return functional.linear(x, layer.weight.to(x.dtype)) * layer.scale

    def block() -> Any:
        cache = [torch.zeros((batch, heads, length, width), dtype=half, device=device) for _ in range(2)]
        made = module(keys=cache[0], values=cache[1])
        for name, size in zip(("qkv", "dense", "up", "down"), _layers(hidden), strict=True):
            made.add_module(name, linear(*size))
        return made

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(block() for _ in range(layers))
            self.head, self.table = linear(vocab, hidden), module(rows=torch.zeros((vocab, hidden), dtype=half, device=device))
            slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)], dtype=half, device=device)
            self.register_buffer("slopes", slopes)
            self.register_buffer("places", torch.arange(length, device=device))

        def forward(self, tokens: Any, position: Any) -> Any:
            x = functional.embedding(tokens, self.table.rows)
            bias = self.slopes[None, :, None, None] * self.places[None, None, None, :].to(half)
            bias = bias.masked_fill(self.places[None, None, None, :] > position, float("-inf"))
            for one in self.blocks:
                qkv = apply(functional.layer_norm(x, (hidden,)), one.qkv)
                q, k, v = qkv.view(batch, 1, 3, heads, width).transpose(1, 3).unbind(2)
                one.keys.index_copy_(2, position, k)
                one.values.index_copy_(2, position, v)
                mask = bias.expand(batch, -1, -1, -1)
                y = functional.scaled_dot_product_attention(q, one.keys, one.values, attn_mask=mask)
                x = x + apply(y.transpose(1, 2).reshape(batch, 1, hidden), one.dense)
                x = x + apply(functional.gelu(apply(functional.layer_norm(x, (hidden,)), one.up), approximate="tanh"), one.down)
            return apply(functional.layer_norm(x, (hidden,)), self.head)[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(Model(), mode="reduce-overhead", fullgraph=True)
    state = {"tokens": torch.full((batch, 1), 7, device=device), "position": torch.tensor([CONTEXT], device=device)}

    def step() -> None:
        state["tokens"] = compiled(state["tokens"], state["position"]).clone()
        state["position"] = state["position"] + 1

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config.json of a BLOOM")
    parser.add_argument("findings", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    findings = Findings(arguments.findings)
    measure(json.loads(arguments.config.read_text()), findings, device=arguments.device, rows=arguments.rows)


if __name__ == "__main__":
    main()
