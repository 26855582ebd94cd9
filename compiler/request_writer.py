"""Let a model write requests to calibrate with: an INT8 engine of it continues the beginning of a user's turn, then answers.

The engine is one for this host's CPU, whatever the target: it writes many requests in each step, its kernels run wherever the
compiler does, and what it writes depends on each request's seed alone and not on its neighbours in a step.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from belle_compile import __version__
from belle_compile.compiler.build_request import BuildRequest
from belle_compile.compiler.calibration import Calibration, encode_set
from belle_compile.compiler.checkpoint import Checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests import Request
from belle_compile.compiler.requests.calibration_set import set_of
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.compiler.work_folder import keep_result, kept_result
from belle_compile.runtime import host
from belle_compile.runtime.artifact import PassRecord
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.serving.request import SamplingParams

STAGE = "calibration"
PASS_NAME = "write-requests"
TEMPERATURES = (0.7, 0.85, 1.0, 1.15)
TEXT_TOKENS = (64, 128)  # the most tokens of a user's text; requests take these, and those below, by turns
ANSWER_TOKENS = (64, 128, 256)
PLAIN_TOKENS = (128, 256, 384)  # of a text without a template
HOW = {"temperatures": TEMPERATURES, "text": TEXT_TOKENS, "answer": ANSWER_TOKENS, "plain": PLAIN_TOKENS}
_GIVE_SOME = "give requests with --calibration FILE, build with --no-calibration, or export without --calibration"
_SEEDS = 1 << 24  # seeds of one writer; those of its answers follow those of its texts
_USER = "the words of the user"
_UNFINISHED = "\ufffd"  # in place of the bytes of a character that a limit of tokens cut off

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """Requests that a model wrote: encoded, and as the manifest records them."""

    calibration: Calibration
    record: PassRecord

    @property
    def sentence(self) -> str:
        """What the report says of their origin."""
        return self.record.refusals[0]


@dataclass(frozen=True)
class Frame:
    """What a prompt template writes before and after the words of a user."""

    before: str
    after: str

    @property
    def is_plain(self) -> bool:
        """Whether the template adds nothing, as for a model that continues texts."""
        return not (self.before or self.after)

    @classmethod
    def of(cls, engine: Engine) -> Frame:
        """The frame of an engine's template."""
        text = ChatTemplate(engine.manifest.prompt_template).render([{"role": "user", "content": _USER}])
        before, _, after = text.partition(_USER)
        return cls(before, after)


def write(
    request: BuildRequest,
    options: SelfWritten,
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    folder: Path,
    build: Callable[[BuildRequest], Path],
) -> Written:
    """Let the model of a build write its requests; `build` makes the engine that writes.

    The requests are kept in `folder`, so that a build that was killed does not write them again. Raises CompileError where this
    host cannot run the engine, and where the model writes nothing.
    """
    key = _key(request, options, checkpoint, digests)
    kept = kept_result(folder / PASS_NAME, key)
    if kept is None:
        kept = _written_by_engine(request, options, folder, build)
        keep_result(folder / PASS_NAME, key, kept)
    requests = tuple(Request.from_json(line) for line in kept["requests"])
    held_out = max(1, len(requests) * options.holdout // (options.size + options.holdout))
    requests_set = set_of(requests[held_out:], requests[:held_out], {"made_by": f"belle-compile {__version__}"})
    calibration = encode_set(
        requests_set, "the requests that the model wrote", checkpoint, raw=kept["plain"], remedy=_GIVE_SOME
    )
    calibration = replace(calibration, notes=(*calibration.notes, *_notes(kept["plain"], request.raw_requests)))
    facts = {
        "synthetic": True,
        "requests": len(calibration.calibration),
        "held_out": len(calibration.holdout),
        "seed": options.seed,
        "digest": calibration.digest,
        "temperatures": list(TEMPERATURES),
        "engine": kept["engine"],
    }
    sentence = "The requests are synthetic, those that were held out for the gate too: the model wrote them itself."
    return Written(calibration, PassRecord(PASS_NAME, facts, len(requests), (sentence,)))


def _notes(plain: bool, asked: bool) -> list[str]:
    """A sentence for a model without a chat template."""
    if not plain or asked:
        return []
    return ["the prompt template adds nothing to a text, so that the model wrote plain texts to calibrate with, not chats"]


def _key(request: BuildRequest, options: SelfWritten, checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    """A digest of all that the requests depend on."""
    amounts = options.size, options.holdout, options.seed
    template = checkpoint.template.jinja
    parts = [__version__, sorted(digests.items()), request.reading.facts, template, request.raw_requests, amounts, HOW]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _written_by_engine(
    request: BuildRequest, options: SelfWritten, folder: Path, build: Callable[[BuildRequest], Path]
) -> dict[str, Any]:
    """The requests as lines of JSON, whether they are plain texts, and the digest of the engine that wrote them."""

    def on_progress(stage: str, done: int, total: int) -> None:
        request.on_progress(f"writer: {stage}", done, total)

    on_progress("build", 0, 0)
    folder.mkdir(parents=True, exist_ok=True)
    # A new name each time: the loader takes a library at a path for the one that it has loaded from there before.
    with tempfile.TemporaryDirectory(prefix="writer-", dir=folder) as name:
        writer = BuildRequest(
            request.checkpoint, Path(name) / "engine", isas=host.host_isas()[:1], template=request.template,
            reading=replace(request.reading, save_decrypted=None), gate=None, drift=False, on_progress=on_progress,
        )  # fmt: skip
        directory = build(writer)
        on_progress("write", 0, 0)
        try:
            with Engine.load(directory) as engine:
                plain, requests = write_requests(engine, options, raw=request.raw_requests)
                return {"plain": plain, "engine": engine.manifest.digest, "requests": [r.to_json() for r in requests]}
        except EngineError as error:
            what, found = "the engine that writes requests cannot run on this host", str(error).removesuffix(".")
            raise CompileError(STAGE, what, found=found, remedy=_GIVE_SOME) from error


def write_requests(engine: Engine, options: SelfWritten, *, raw: bool = False) -> tuple[bool, list[Request]]:
    """Let an engine write requests without duplicates; returns whether they are plain texts, and the requests.

    A request of a model with a template is what the model writes where a user's turn begins, and the model's own answer to it.
    Without a template, or with `raw`, it is a text from the first token on.
    """
    frame = Frame("", "") if raw else Frame.of(engine)
    start = engine.chat.encode_text(frame.before) or _first_token(engine)
    count, seed = options.size + options.holdout, options.seed * 2 * _SEEDS
    lengths = PLAIN_TOKENS if frame.is_plain else TEXT_TOKENS
    stop = (frame.after,) if frame.after.strip() else ()
    texts = _generate(engine, [start] * count, lengths, seed, stop)
    texts = list(dict.fromkeys(text for text in texts if text))
    if frame.is_plain:
        return True, [Request(text=text, line=line) for line, text in enumerate(texts, 1)]
    prompts = [engine.chat.encode([{"role": "user", "content": text}]) for text in texts]
    answers = _generate(engine, prompts, ANSWER_TOKENS, seed + _SEEDS)
    pairs = zip(texts, answers, strict=True)
    return False, [Request(text=text, answer=answer, line=line) for line, (text, answer) in enumerate(pairs, 1)]


def _first_token(engine: Engine) -> list[int]:
    """The token that a text begins after, for a model whose prompts do not begin with one."""
    special = engine.manifest.special_tokens
    tokens = [token for token in (special.bos, *special.eos) if token is not None]
    if not tokens:
        found = "no beginning-of-sequence and no end-of-sequence token"
        raise CompileError(STAGE, "a model cannot begin to write requests", found=found, remedy=_GIVE_SOME)
    return tokens[:1]


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], lengths: Sequence[int], seed: int, stop: tuple[str, ...] = ()
) -> list[str]:
    """The engine's continuations of prompts as texts, each with a seed of its own, temperatures and `lengths` by turns. Prompts
    that leave no room in the context are continued by nothing."""
    room = [engine.max_context - len(prompt) for prompt in prompts]
    chosen = [number for number in range(len(prompts)) if room[number] > 0]
    params = [
        SamplingParams(
            temperature=TEMPERATURES[number % len(TEMPERATURES)], top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
            min_tokens=0, seed=seed + number, stop=stop, max_new_tokens=min(lengths[number % len(lengths)], room[number]),
        )
        for number in chosen
    ]  # fmt: skip
    texts = [""] * len(prompts)
    for number, result in zip(chosen, engine.generate([list(prompts[n]) for n in chosen], params), strict=True):
        texts[number] = result.text.rstrip(_UNFINISHED).strip()
    return texts
