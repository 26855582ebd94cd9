"""Parts of an engine without kernels: an executor whose model is a function of the cached tokens, tiny tokenizers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from belle_compile.runtime import artifact
from belle_compile.runtime.artifact import FileRecord, GenerationDefaults, Manifest, SpecialTokens
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.profiling import Recorder
from belle_compile.runtime.program import BLOCK_SIZE, Call, FusionCalls, KVLayout, Logits, Program
from belle_compile.runtime.serving.candidates import Few, Row, Rows
from belle_compile.runtime.serving.draft_model import DraftModel
from belle_compile.runtime.serving.request import Limits, Request, RequestDefaults, SamplingParams
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.telemetry import Telemetry
from belle_compile.runtime.tokenizer import Tokenizer

VOCABULARY = 300
EOS = 2
# The fields behind `prompt_lookup` of a request that leaves them open.
NOTHING_ELSE = (0.0, 0.0, 0.0, (), 0, (), None, None, 0, "", None, "")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
Rule = Callable[[list[int]], NDArray[np.float32]]


def hash_rule(context: list[int]) -> NDArray[np.float32]:
    """Logits that depend on every token of the context. The end-of-sequence token is never likely."""
    digest = hashlib.sha256(np.asarray(context, np.int32).tobytes()).digest()
    logits = np.random.default_rng(list(digest)).normal(size=VOCABULARY).astype(np.float32) * 3
    logits[EOS] = -20
    return logits


def script_rule(prompt_length: int, answer: list[int]) -> Rule:
    """A model that generates `answer` after any prompt of this length, then ends."""

    def rule(context: list[int]) -> NDArray[np.float32]:
        logits = np.zeros(VOCABULARY, np.float32)
        generated = len(context) - prompt_length
        logits[answer[generated] if generated < len(answer) else EOS] = 50
        return logits

    return rule


class FakeExecutor:
    """An executor whose paged cache holds tokens in place of keys and values, and whose logits are `rule(cached tokens)`.

    A wrong position, block, slot or row leads to other tokens, and so to other logits.
    """

    def __init__(
        self,
        rule: Rule = hash_rule,
        *,
        max_tokens: int = 24,
        max_rows: int = 6,
        max_sequences: int = 5,
        max_blocks: int = 8,
        num_blocks: int = 16,
    ) -> None:
        self.rule = rule
        self.vocab_size = VOCABULARY
        self.num_blocks = num_blocks
        self.kv_block_bytes = 64 * BLOCK_SIZE
        self.kernels = "kernels-avx2"
        self.cache = np.full((num_blocks, BLOCK_SIZE), -1, np.int64)
        flat = [np.full(size, -7, np.int32) for size in (max_tokens, max_tokens, max_tokens, max_rows)]
        table = np.full((max_sequences, max_blocks), -7, np.int32)
        self.batch = StepBatch(flat[0], flat[1], flat[2], table, flat[3])
        self.steps: list[tuple[int, int]] = []  # (tokens, rows) of each step
        self.closed = False
        self.isa, self.threads = "avx2", 1
        self.program = fake_program(max_tokens, max_rows, max_sequences, max_blocks)
        self.recorder: Recorder | None = None
        self.failure: BaseException | None = None

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        assert 0 < batch.tokens <= batch.max_tokens and batch.rows <= batch.max_rows
        self.steps.append((batch.tokens, batch.rows))
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.recorder is not None:
            calls = 2 if batch.rows else 1
            self.recorder.walked(np.arange(calls), 1000 * np.arange(calls + 1))
        for source, destination in batch.copies:
            assert source != destination
            self.cache[destination] = self.cache[source]
        seen: set[tuple[int, int]] = set()
        for t in range(batch.tokens):
            slot, position = int(batch.sequences[t]), int(batch.positions[t])
            assert (slot, position) not in seen, "a token is twice in one step"
            seen.add((slot, position))
            self.cache[batch.block_table[slot, position // BLOCK_SIZE], position % BLOCK_SIZE] = batch.token_ids[t]
        return np.stack([self._logits(int(t)) for t in batch.logit_rows[: batch.rows]] or [np.empty(0, np.float32)])

    def record(self, recorder: Recorder | None) -> None:
        self.recorder = recorder

    def read_bandwidth(self) -> float:
        return 1e10

    def close(self) -> None:
        self.closed = True

    def _logits(self, t: int) -> NDArray[np.float32]:
        slot, position = int(self.batch.sequences[t]), int(self.batch.positions[t])
        blocks = self.batch.block_table[slot, : position // BLOCK_SIZE + 1]
        return self.rule([int(token) for token in self.cache[blocks].reshape(-1)[: position + 1]])


class CandidateExecutor(FakeExecutor):
    """Returns no logits but those that a step's `candidates` request, in place of a GPU or of ranks."""

    def __init__(self, rule: Rule = hash_rule, **limits: int) -> None:
        super().__init__(rule, **limits)
        self.batch.candidates = np.full(self.batch.max_rows, -7, np.int32)
        self.few = self.whole = 0  # rows returned so far

    def step(self, batch: StepBatch) -> Rows:  # type: ignore[override]
        assert batch.candidates is not None
        logits = super().step(batch)
        return [self._restricted(row, int(most)) for row, most in zip(logits, batch.candidates[: batch.rows], strict=False)]

    def _restricted(self, row: NDArray[np.float32], most: int) -> Row:
        assert most >= 0
        if most == 0 or most >= len(row):
            self.whole += 1
            return row
        self.few += 1
        tokens = np.flatnonzero(row >= np.sort(row)[-most])
        return Few(tokens, row[tokens])


def fake_program(max_tokens: int, max_rows: int, max_sequences: int, max_blocks: int) -> Program:
    """Attention over the cache of one layer, 64 bytes a token, and a head of 1000 bytes."""
    calls = (Call("attention", "h.0", "T", (), "attention"), Call("linear", "head", "R", (), "head", bytes=1000))
    logits, kv = Logits(0, VOCABULARY, 0, VOCABULARY), KVLayout(1, 1, 8, "float32")
    return Program(max_tokens, max_rows, max_sequences, max_blocks, 4 * VOCABULARY * max_rows, VOCABULARY, logits, kv, calls,
                   FusionCalls(2, 2))  # fmt: skip


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE as BLOOM's: every byte is a token, some merges, and <unk>, <s>, </s> as ids 0, 1, 2."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["你好,世界", "hello world, hello there", "assistant: user: 你好"] * 4, trainer)
    return tokenizer


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """LLaMA's kind: ▁ for spaces, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "你", "好", "!"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def special_tokens(**changes: Any) -> SpecialTokens:
    return SpecialTokens(**{"bos": 1, "eos": (EOS,), "pad": None, "add_bos": False} | changes)


def manifest(files: dict[str, FileRecord] | None = None, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "model": artifact.ModelInfo("bloom", "tiny", 1234, {"hidden_size": 64, "num_layers": 2}, {"config.json": "0" * 64}),
        "target": artifact.TargetInfo("cpu", "tvm", ("avx2",), artifact.Requirements("x86_64", ("avx2",), 1 << 20)),
        "passes": (artifact.PassRecord("quantize", {"bits": 8}, 14, ("head: kept",)),),
        "quantization": {"weights": "int8"},
        "kernel_calls": artifact.KernelCalls(40, 18),
        "prompt_template": artifact.PromptTemplate("tiny", TEMPLATE, "<s>", "</s>"),
        "special_tokens": special_tokens(),
        "generation": GenerationDefaults(max_new_tokens=12, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
        "toolchain": {"belle-compile": "0.1.0"},
        "files": files or {},
    }
    return Manifest(**fields | changes)


def make_request(
    prompt: Sequence[int] = (),
    params: SamplingParams | None = None,
    *,
    defaults: GenerationDefaults | None = None,
    eos: tuple[int, ...] = (),
    max_context: int = 1 << 20,
    vocab_size: int = 1 << 20,
) -> Request:
    """A resolved request; what `params` leaves open is off."""
    engine_defaults = RequestDefaults(defaults or GenerationDefaults(), eos, Limits(max_context, max_context), vocab_size)
    return Request.resolve(prompt, params or SamplingParams(), engine_defaults)


def make_engine(
    executor: FakeExecutor | None = None,
    result_cache: ResultCacheOptions | None = None,
    scheduler: SchedulerOptions | None = None,
    telemetry: Telemetry | None = None,
    drafts: DraftModel | None = None,
    **changes: Any,
) -> Engine:
    changed = manifest(**changes)
    tokenizer = Tokenizer(byte_tokenizer(), changed.special_tokens)
    return Engine(changed, tokenizer, executor or FakeExecutor(), result_cache, scheduler, telemetry, drafts=drafts)


def make_directory(path: Path, contents: dict[str, bytes], **changes: Any) -> Path:
    """An engine directory with these files and a manifest of their digests."""
    shutil.rmtree(path, ignore_errors=True)
    files: dict[str, FileRecord] = {}
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
        files[name] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    (path / artifact.MANIFEST_NAME).write_text(artifact.manifest_text(manifest(files, **changes)), encoding="utf-8")
    return path
