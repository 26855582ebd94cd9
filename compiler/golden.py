"""The golden answers of an engine: prompts with greedy tokens that every correct host chooses, computed during the build.

Each of a few texts is cut after the token whose next one is clearest, which makes the prompt. A token is clear if its logit
leads the second best by `LEAD` standard deviations of the logits after the prompt; an answer ends before its first token that
is not. Kernels for different instruction sets, and the NumPy meanings, add floats in different orders, and a difference in the
last bit may round an activation to the next integer. On SmolLM2-135M and on LLaMA-1.1B with random weights, the NumPy meanings
move the lead by 0.05 and 0.04 standard deviations (root mean square over 48 choices each; at most 0.17). AVX2 and AVX512-VNNI
give the same bits.

The same engine gets the same answers on every build host. An engine for processors is run with the last of its instruction sets
that the host has, which other hosts have too and which computes the same bits on all of them. What this kind of machine cannot
run, and every engine for GPUs, is computed by the NumPy meanings in float64, which hosts round to the same float32 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import safe_open

from belle_compile.compiler.backends import Backend, Repartitionable
from belle_compile.compiler.ir.cache import BLOCK_SIZE, PagedCache
from belle_compile.compiler.ir.evaluate import evaluate_ranks
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.precise import precise
from belle_compile.compiler.ir.signature import dtype_name
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime.artifact import Manifest
from belle_compile.runtime.engine import Engine, Result
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import executor_of
from belle_compile.runtime.program import WEIGHTS_NAME
from belle_compile.runtime.selftest import GoldenAnswer, GoldenAnswers, greedy
from belle_compile.runtime.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Tokens = tuple[int, ...]
# Makes a golden answer of so many tokens or fewer from each text; None for a text without a clear token.
Answer = Callable[[Sequence[Tokens], int], list[GoldenAnswer | None]]

LEAD = 0.5  # of the standard deviation of a row of logits: ten times what implementations were measured to differ by
PROMPTS = 6  # prompts of a self-test
MOST_TOKENS, FEWEST_TOKENS = 12, 2  # tokens of an answer; the second one is computed from the KV cache
# One token of all answers takes a pass over the weights. The model's size and the target, not the build host, decide how many
# tokens an answer has, so that about so many weights are read: by kernels (where the target is a kind of machine), or by the
# meanings. For GPUs, SmolLM2-135M has 7 tokens and LLaMA-1.1B has 2; for CPUs both have 12, and BLOOM-7B has 4.
WEIGHTS_RUN, WEIGHTS_EVALUATED = 32 << 30, 1 << 30
FIRST_CUT = 4  # tokens of the shortest prompt, where a text has as many
MOST_TEXT = 32  # tokens of a text

# Texts that even small models find easy to continue. They are taken in turn until PROMPTS have a clear token.
TEXTS = (
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "天地玄黄，天地玄黄，天地玄黄，天",
    "The cat sat on the mat. The cat sat on the mat. The cat",
    "星期一、星期二、星期三、星期四、星期五",
    "one, two, three, one, two, three, one, two, three, one",
    "你好，世界。你好，世界。你好，世界。你好",
    "x = 1; y = 2; x = 1; y = 2; x = 1; y =",
    "中国的首都是北京，法国的首都是巴黎，英国的首都是",
    "Monday, Tuesday, Wednesday, Thursday, Friday",
    "一、二、三、四、五、六、七、八、九、十",
    "Hello, world. Hello, world. Hello, world. Hello",
    "人之初，性本善。性相近，习相远。人之初，性本",
)


def golden_answers(
    engine: Path, manifest: Manifest, backend: Backend, graphs: Sequence[ir.Model], kv_type: str
) -> GoldenAnswers:
    """Compute the golden answers of a complete engine directory, which has the weights of the ranks' `graphs`.

    The same engine has the same answers on every host. Raises EngineError if this host should be able to run the engine and
    cannot.
    """
    texts = _texts(engine, manifest)
    tokens = answer_tokens(manifest)
    found: list[GoldenAnswer] = []
    with _answering(engine, manifest, backend, graphs, kv_type) as answer:
        for start in range(0, len(texts), PROMPTS):
            found += [golden for golden in answer(texts[start : start + PROMPTS], tokens) if golden]
            if len(found) >= PROMPTS:
                break
    reason = "" if found else f"the model clearly prefers no token after any part of {len(texts)} texts"
    return GoldenAnswers(LEAD, tuple(found[:PROMPTS]), reason)


def answer_tokens(manifest: Manifest) -> int:
    """The number of tokens that an answer of the engine has if all are clear."""
    weights = WEIGHTS_RUN if manifest.target.requires.arch else WEIGHTS_EVALUATED
    return max(FEWEST_TOKENS, min(MOST_TOKENS, weights // max(manifest.model.parameters, 1)))


def clearest_cut(logits: Floats) -> tuple[int, float] | None:
    """The number of tokens to keep of a text with these logits [tokens, vocabulary] after each of its tokens, so that the next
    one is clearest, and the lead that is clear after them; None if no token is clear."""
    first = min(FIRST_CUT, len(logits)) - 1
    rows = logits[first:].astype(np.float64)
    second, best = np.partition(rows, -2, axis=-1)[:, -2:].T
    spreads = rows.std(axis=-1)
    leads = np.divide(best - second, spreads, out=np.zeros_like(spreads), where=spreads > 0)
    cut = int(leads.argmax())
    return (first + cut + 1, LEAD * float(spreads[cut])) if leads[cut] >= LEAD else None


def lowest_isa(manifest: Manifest) -> str | None:
    """The last of the engine's instruction sets that this host has; None if the host cannot run the engine, or if the engine
    is for no kind of machine, and what runs it depends on the devices of the host."""
    target, factory = manifest.target, executor_of(manifest)
    if not target.requires.arch:
        return None
    try:
        factory.check_host(target, target.ranks)
    except EngineError:
        return None
    return factory.usable_isas(target)[-1]


def _texts(engine: Path, manifest: Manifest) -> list[Tokens]:
    """The texts as token ids, as the engine encodes them; those too long for the model, and tokens that it lacks, are left
    out."""
    tokenizer = Tokenizer.from_file(engine / "tokenizer.json", manifest.special_tokens)
    dimensions = manifest.model.dimensions
    vocabulary, most = dimensions["vocab_size"], min(MOST_TEXT, dimensions["max_position"] - MOST_TOKENS)
    encoded = [tuple(token for token in tokenizer.encode(text)[:most] if token < vocabulary) for text in TEXTS]
    return [tokens for tokens in dict.fromkeys(encoded) if tokens]


@contextmanager
def _answering(
    engine: Path, manifest: Manifest, backend: Backend, graphs: Sequence[ir.Model], kv_type: str
) -> Iterator[Answer]:
    isa = lowest_isa(manifest)
    if isa is None:
        yield Meanings(read_back(engine, backend, graphs), kv_type).answers
        return
    ranks = manifest.target.ranks
    with Engine.load(engine, isa=isa) if ranks == 1 else RankedEngine(engine, ranks, isa=isa) as running:
        yield lambda texts, tokens: _engine_answers(running, texts, tokens)


def _engine_answers(engine: Engine | RankedEngine, texts: Sequence[Tokens], tokens: int) -> list[GoldenAnswer | None]:
    """What the engine answers."""
    cuts = [clearest_cut(engine.logits(text)) for text in texts]
    prompts = [text[: cut[0]] for text, cut in zip(texts, cuts, strict=True) if cut]
    params = replace(greedy(tokens), logprobs=2)
    results = iter(engine.generate([list(prompt) for prompt in prompts], params) if prompts else [])
    return [_clear_part(next(results), cut[1]) if cut else None for cut in cuts]


def _clear_part(result: Result, clear_lead: float) -> GoldenAnswer | None:
    """The tokens of an answer before the first one whose lead is not clear."""
    assert result.logprobs is not None, "asked for"
    leads = [best.logprob - second[1] for best in result.logprobs for second in best.top[1:]]
    clear = list(takewhile(lambda lead: lead >= clear_lead, leads))
    return GoldenAnswer(tuple(result.prompt_token_ids), tuple(result.token_ids[: len(clear)])) if clear else None


@dataclass(frozen=True)
class Meanings:
    """Answers by the NumPy meanings of the ranks' `graphs`. A weight is in memory only while a node reads it; the KV cache, of
    type `kv_type`, holds the texts of one call."""

    graphs: Sequence[ir.Model]
    kv_type: str

    def answers(self, texts: Sequence[Tokens], tokens: int) -> list[GoldenAnswer | None]:
        """Answer the texts together: one pass over the weights for all of their tokens, and one for each further token of the
        answers. A text whose next token is not clear takes no further part."""
        blocks = -(-(max(map(len, texts)) + tokens) // BLOCK_SIZE)
        caches = [self._cache(graph, blocks * len(texts)) for graph in self.graphs]
        table = np.arange(blocks * len(texts), dtype=np.int32).reshape(len(texts), blocks)
        logits = self._step({number: (0, text) for number, text in enumerate(texts)}, table, caches)
        cuts = {number: cut for number, rows in logits.items() if (cut := clearest_cut(rows))}
        clear: dict[int, list[int]] = {number: [] for number in cuts}
        live = {number: logits[number][cut - 1] for number, (cut, _) in cuts.items()}
        while live:
            leading = {number: int(row.argmax()) for number, row in live.items() if _lead(row) >= cuts[number][1]}
            for number, token in leading.items():
                clear[number].append(token)
            new = {
                number: (cuts[number][0] + len(clear[number]) - 1, (token,))
                for number, token in leading.items()
                if len(clear[number]) < tokens
            }
            live = {number: rows[0] for number, rows in self._step(new, table, caches).items()} if new else {}
        return [
            GoldenAnswer(text[: cuts[number][0]], tuple(clear[number])) if clear.get(number) else None
            for number, text in enumerate(texts)
        ]

    def _step(
        self,
        new: Mapping[int, tuple[int, Sequence[int]]],
        table: npt.NDArray[np.int32],
        caches: Sequence[PagedCache],
    ) -> dict[int, Floats]:
        """The logits [tokens, vocabulary] after the new tokens of each sequence, which begin at a position of it.

        What the cache has from this position on is overwritten before it is read."""
        counts = [len(tokens) for _, tokens in new.values()]
        inputs = {
            "token_ids": np.concatenate([np.asarray(tokens, np.int32) for _, tokens in new.values()]),
            "positions": np.concatenate([np.arange(at, at + len(ids), dtype=np.int32) for at, ids in new.values()]),
            "sequences": np.repeat(np.asarray([*new], np.int32), counts),
            "block_table": table,
            "logit_rows": np.arange(sum(counts), dtype=np.int32),
        }
        parts = evaluate_ranks(self.graphs, inputs, caches, apply=precise)
        logits = np.concatenate([part["logits"] for part in parts], axis=1)
        return dict(zip(new, np.split(logits, np.cumsum(counts)[:-1]), strict=True))

    def _cache(self, graph: ir.Model, blocks: int) -> PagedCache:
        layers, heads, width = (int(graph.metadata_props[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
        return PagedCache(layers, heads, width, blocks, self.kv_type)


def _lead(row: Floats) -> float:
    """How far the largest logit is above the second largest."""
    second, first = np.partition(row.astype(np.float64), -2)[-2:]
    return float(first - second)


def read_back(engine: Path, backend: Backend, graphs: Sequence[ir.Model]) -> list[ir.Model]:
    """Copies of the ranks' graphs whose weights are read from the engine, rather than quantized again each time.

    A weight that is not in the engine under its name is computed as before, and so are all weights if the backend cannot read
    what it packed: the values are the same.
    """
    copies = [graph.clone() for graph in graphs]
    if isinstance(backend, Repartitionable):
        for rank, graph in enumerate(copies):
            file = engine / f"rank{rank}" / WEIGHTS_NAME
            with safe_open(file, framework="numpy") as weights:
                names = set(weights.keys())
            for name, value in graph.graph.initializers.items():
                if name in names and value.const_value is not None:
                    value.const_value = _packed(file, name, value.const_value, backend)
    return copies


def _packed(file: Path, name: str, tensor: ir.TensorProtocol, backend: Repartitionable) -> ir.LazyTensor:
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype

    def read() -> npt.NDArray[np.generic]:
        with safe_open(file, framework="numpy") as weights:
            packed = weights.get_tensor(name)
        return np.asarray(backend.unpack(packed, shape, dtype_name(dtype)), dtype.numpy())

    return lazy(name, read, shape, dtype, sources=[f"{file}: {name}"])
