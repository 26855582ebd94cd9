"""One adapter per peer: __init__(engine_path, option), gen(batch, n_new, ignore_eos, tick), and logits(ids, start) if offered.

Decoding is greedy, batches hold prompts of one length, and PEERS_THREADS says how many threads to use. Each class runs under
its peer's interpreter, so this file imports nothing of this project. Ours is in ours.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = int(os.environ.get("PEERS_THREADS") or os.cpu_count() or 1)
Ids = list[int]
Floats = Any  # an array
Tick = Callable[[], object]  # called after every new token of the batch


def nothing() -> None:
    """The tick of a run without timestamps."""


def parse(option: str) -> tuple[list[str], dict[str, str]]:
    """Split an option such as "int8 threads=1" into its plain words and its settings."""
    words = option.split()
    return [w for w in words if "=" not in w], dict(w.split("=", 1) for w in words if "=" in w)


class LlamaCpp:
    """llama.cpp through the C interface of llama-cpp-python; option "norepack" keeps the weights out of AMX layout."""

    CONTEXT, BATCH, SEQUENCES = 2304, 512, 8

    def __init__(self, engine: str, option: str) -> None:
        import ctypes

        import llama_cpp

        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = option != "norepack"
        self.model = llama_cpp.llama_model_load_from_file(engine.encode(), model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = self.CONTEXT, self.BATCH, self.BATCH
        context.n_seq_max, context.kv_unified = self.SEQUENCES, True
        context.n_threads = context.n_threads_batch = THREADS
        if hasattr(context, "n_outputs_max"):
            context.n_outputs_max = 0
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {engine}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch = llama_cpp.llama_batch_init(self.BATCH, 0, self.SEQUENCES)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[Floats]:
        """Run (token, position, sequence, wanted) rows; the wanted logits, valid until the next call."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), shape=(self.vocab_size,))
            for i, row in enumerate(rows)
            if row[3]
        ]

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def gen(self, batch: list[Ids], n_new: int, ignore_eos: bool, tick: Tick = nothing) -> list[Ids]:
        self._clear()
        prompt = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(batch) for p, t in enumerate(ids)]
        tokens: Ids = []
        for i in range(0, len(prompt), self.BATCH):
            tokens += [int(x.argmax()) for x in self._decode(prompt[i : i + self.BATCH])]
        out = [[t] for t in tokens]
        tick()
        for k in range(n_new - 1):
            rows = [(t, len(ids) + k, s, True) for s, (t, ids) in enumerate(zip(tokens, batch, strict=True))]
            tokens = [int(x.argmax()) for x in self._decode(rows)]
            for new, t in zip(out, tokens, strict=True):
                new.append(t)
            tick()
        return out if ignore_eos else [self._until_eos(new) for new in out]

    def _until_eos(self, ids: Ids) -> Ids:
        ends = [i for i, t in enumerate(ids) if self.lib.llama_vocab_is_eog(self.vocab, t)]
        return ids[: ends[0] + 1] if ends else ids

    def logits(self, ids: Ids, start: int) -> Floats:
        self._clear()
        return np.stack([x.copy() for x in self._decode([(t, p, 0, p >= start) for p, t in enumerate(ids)])])


class CTranslate2:
    """CTranslate2; option: compute type, then threads=K and isa=AVX512 (its own choice if left out, or without AVX512)."""

    def __init__(self, engine: str, option: str) -> None:
        words, settings = parse(option)
        if "isa" in settings and "avx512bw" in Path("/proc/cpuinfo").read_text():
            os.environ["CT2_FORCE_CPU_ISA"] = settings["isa"]  # read when the library is loaded
        import ctranslate2

        self.generator = ctranslate2.Generator(
            engine,
            device="cpu",
            compute_type=words[0] if words else "int8",
            inter_threads=1,
            intra_threads=int(settings.get("threads", THREADS)),
        )
        self.tokens: list[str] = json.loads((Path(engine) / "vocabulary.json").read_text())

    def gen(self, batch: list[Ids], n_new: int, ignore_eos: bool, tick: Tick = nothing) -> list[Ids]:
        results = self.generator.generate_batch(
            [[self.tokens[i] for i in ids] for ids in batch],
            max_length=n_new,
            min_length=n_new if ignore_eos else 0,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=None if tick is nothing else lambda step: bool(tick()),
        )
        return [result.sequences_ids[0] for result in results]

    def logits(self, ids: Ids, start: int) -> Floats:
        return np.array(self.generator.forward_batch([ids]))[0, start:]


class OrtGenAI:
    """onnxruntime-genai; no options."""

    def __init__(self, engine: str, option: str) -> None:
        import onnxruntime_genai

        self.lib = onnxruntime_genai
        config = onnxruntime_genai.Config(engine)
        threads = {"intra_op_num_threads": THREADS, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = onnxruntime_genai.Model(config)

    def _generator(self, batch: list[Ids], n_new: int, ignore_eos: bool) -> Any:
        params = self.lib.GeneratorParams(self.model)
        end = len(batch[0]) + n_new
        params.set_search_options(
            max_length=end, do_sample=False, batch_size=len(batch), **({"min_length": end} if ignore_eos else {})
        )
        return self.lib.Generator(self.model, params)

    def gen(self, batch: list[Ids], n_new: int, ignore_eos: bool, tick: Tick = nothing) -> list[Ids]:
        generator = self._generator(batch, n_new, ignore_eos)
        generator.append_tokens(np.array(batch, dtype=np.int32))
        for _ in range(n_new):
            if generator.is_done():
                break
            generator.generate_next_token()
            tick()
        return [[int(t) for t in generator.get_sequence(i)[len(batch[0]) :]] for i in range(len(batch))]

    def logits(self, ids: Ids, start: int) -> Floats:
        generator, out = self._generator([ids], 1, True), []
        for begin, end in [(0, start + 1), *((i, i + 1) for i in range(start + 1, len(ids)))]:
            generator.append_tokens(np.array([ids[begin:end]], dtype=np.int32))
            out.append(np.array(generator.get_logits(), dtype=np.float32).reshape(-1))
        return np.stack(out)


class OpenVINO:
    """OpenVINO GenAI; option words: f32 (the default precision is bf16 where the processor has it), SDPA or PA."""

    def __init__(self, engine: str, option: str) -> None:
        import openvino
        import openvino_genai

        self.core, self.tensor, self.lib, self.engine = openvino.Core, openvino.Tensor, openvino_genai, engine
        self.settings: dict[str, object] = {"INFERENCE_NUM_THREADS": THREADS}
        if "f32" in option.split():
            self.settings["INFERENCE_PRECISION_HINT"] = "f32"
        backend = [word for word in option.split() if word != "f32"]
        backends = {"ATTENTION_BACKEND": backend[0]} if backend else {}
        self.pipeline = openvino_genai.LLMPipeline(engine, "CPU", **self.settings, **backends)
        self.request: Any = None

    def gen(self, batch: list[Ids], n_new: int, ignore_eos: bool, tick: Tick = nothing) -> list[Ids]:
        ids = np.array(batch, dtype=np.int64)
        config = self.lib.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = n_new, False, ignore_eos
        inputs = self.lib.TokenizedInputs(self.tensor(ids), self.tensor(np.ones_like(ids)))
        return [[int(t) for t in new] for new in self.pipeline.generate(inputs, config, *self._streamer(tick)).tokens]

    def _streamer(self, tick: Tick) -> list[Any]:
        """What calls `tick`; only for one prompt, as OpenVINO streams no batches."""
        if tick is nothing:
            return []
        lib: Any = self.lib

        def write(streamer: Any, token: Any) -> Any:
            tick()
            return lib.StreamingStatus.RUNNING

        return [type("Streamer", (lib.StreamerBase,), {"write": write, "end": lambda streamer: None})()]

    def logits(self, ids: Ids, start: int) -> Floats:
        """By the same model outside the pipeline, which gives none."""
        if self.request is None:
            model = self.core().compile_model(f"{self.engine}/openvino_model.xml", "CPU", self.settings)
            self.request = model.create_infer_request()
        self.request.reset_state()
        row = np.array([ids], dtype=np.int64)
        given = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(row.size)[None]}
        names = {name for port in self.request.model_inputs for name in port.names}
        inputs = {name: value for name, value in given.items() if name in names}
        self.request.infer({**inputs, "beam_idx": np.zeros(1, dtype=np.int32)})
        return np.array(self.request.get_tensor("logits").data[0, start:], dtype=np.float32)


class PromptThenTokens:
    """A streamer of Transformers, which gets the prompt first."""

    def __init__(self, tick: Tick) -> None:
        self.tick, self.seen = tick, 0

    def put(self, value: Any) -> None:
        self.seen += 1
        if self.seen > 1:
            self.tick()

    def end(self) -> None:
        pass


class Transformers:
    """Hugging Face Transformers; option: fp32 or bf16, then int8dyn (torch.ao), taodyn or tawo (torchao) or compile.

    With "traced", a token is generated by a trace of the model in a loop, without `generate`.
    """

    def __init__(self, engine: str, option: str) -> None:
        import torch
        import transformers

        self.torch: Any = torch
        torch.set_num_threads(THREADS)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        words = option.split() or ["fp32"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[words[0]]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(engine, dtype=dtype).eval()
        if "int8dyn" in words:
            self.torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        if "taodyn" in words or "tawo" in words:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

            quantize_(self.model, (Int8DynamicActivationInt8WeightConfig if "taodyn" in words else Int8WeightOnlyConfig)())
        if "compile" in words:
            self.model.forward = torch.compile(self.model.forward, dynamic=True)
        self.eos = self.model.generation_config.eos_token_id
        self.model.generation_config.pad_token_id = self.eos if isinstance(self.eos, int) else 0
        self.traced: TracedStep | None = TracedStep(torch, transformers.DynamicCache, self.model) if "traced" in words else None

    def gen(self, batch: list[Ids], n_new: int, ignore_eos: bool, tick: Tick = nothing) -> list[Ids]:
        if self.traced:
            return self.traced.generate(batch, n_new, set() if ignore_eos else {self.eos}, tick)
        ids = self.torch.tensor(batch)
        self.model.generation_config.eos_token_id = None if ignore_eos else self.eos
        with self.torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=n_new,
                do_sample=False,
                use_cache=True,
                streamer=None if tick is nothing else PromptThenTokens(tick),
            )
        new: list[Ids] = out[:, ids.shape[1] :].tolist()
        return new

    def logits(self, ids: Ids, start: int) -> Floats:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0, start:].float().numpy()


class TracedStep:
    """Greedy decoding by a trace of a model's step, whose cache is a tuple of tensors; one trace for each size of a batch."""

    def __init__(self, torch: Any, cache: Any, model: Any) -> None:
        self.torch, self.cache, self.model = torch, cache, model
        self.traces: dict[int, Any] = {}

    def generate(self, batch: list[Ids], n_new: int, ends: set[int], tick: Tick) -> list[Ids]:
        torch = self.torch
        with torch.inference_mode():
            output = self.model(torch.tensor(batch), use_cache=True, logits_to_keep=1)
            logits, kept = output.logits, tensors_of(output.past_key_values)
            step, new = self.step_for(len(batch), kept), []
            for position in range(len(batch[0]), len(batch[0]) + n_new):
                ids = logits[:, -1].argmax(-1, keepdim=True)
                new.append(ids[:, 0].tolist())
                tick()
                if len(new) == n_new or ends.intersection(new[-1]):
                    break
                logits, *kept = step(ids, torch.full_like(ids, position), *kept)
        return [list(ids) for ids in zip(*new, strict=True)]

    def step_for(self, size: int, kept: list[Any]) -> Any:
        """The trace for batches of `size` sequences."""
        if size not in self.traces:
            step = self

            class Step(self.torch.nn.Module):  # type: ignore[misc, name-defined]
                def __init__(self) -> None:
                    super().__init__()
                    self.model = step.model

                def forward(self, ids: Any, positions: Any, *kept: Any) -> tuple[Any, ...]:
                    cache = step.cache()
                    for layer in range(len(kept) // 2):
                        cache.update(kept[2 * layer], kept[2 * layer + 1], layer)
                    output = self.model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
                    return (output.logits, *tensors_of(cache))

            ids = self.torch.zeros(size, 1, dtype=self.torch.long)
            positions = self.torch.full_like(ids, kept[0].shape[2])
            self.traces[size] = self.torch.jit.trace(Step().eval(), (ids, positions, *kept), check_trace=False)
        return self.traces[size]


def tensors_of(cache: Any) -> list[Any]:
    """Keys and values of each layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
