"""The model class `belle` of the harness: requests with the rules of its Transformers model, answered by an engine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from belle_compile.runtime import Engine, EngineError
from belle_compile.runtime.executors import ProfilableExecutor
from belle_compile.runtime.prompt import ChatTemplate
from benchmarks.lm_eval.translate import (
    Window,
    answer_text,
    by_inputs,
    cut_left,
    sampling_params,
    score_windows,
    special_stops,
    window,
)

_log = logging.getLogger(__name__)
_ROUNDS = 4  # answers submitted together, in sequences the engine runs at once: few enough for a progress bar to move


@register_model("belle")
class BelleLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """An engine as the harness sees it; `--model_args` are the arguments.

    `max_length` lowers the tokens a request may have, which otherwise are the engine's; as logits of a whole text are held at
    once, it also bounds memory (4 bytes x max_length x vocabulary). `add_bos_token` says whether text begins with BOS, which
    otherwise the engine knows. The harness hands its `batch_size`, `max_batch_size` and `device` (cuda:0 where nobody said
    otherwise) to every model; they mean nothing here, as an engine batches by itself and was built for a device.
    """

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        threads: int | None = None,
        isa: str | None = None,
        kv_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(engine, Engine):
            engine = Engine.load(engine, threads=threads, isa=isa, kv_tokens=kv_tokens)
        self.engine = engine
        self.max_gen_toks = max_gen_toks
        self.max_length = engine.max_context if max_length is None else max_length
        if not 1 <= self.max_length <= engine.max_context:
            expected = f"1 to {engine.max_context}, which the engine's cache holds"
            raise EngineError("eval", "max_length", found=str(max_length), expected=expected)
        self._special = engine.manifest.special_tokens
        self._add_bos = self._special.add_bos if add_bos_token is None else add_bos_token
        self._template = ChatTemplate(engine.manifest.prompt_template)

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The first end-of-sequence token."""
        if not self._special.eos:
            raise EngineError("eval", "the engine", found="no end-of-sequence token", expected="one")
        return self._special.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: BOS, or EOS where there is none."""
        return self.eot_token_id if self._special.bos is None else self._special.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, beginning with BOS where the model wants it unless `add_special_tokens` is False."""
        return self.engine.tokenizer.encode(string, add_bos=self._add_bos and add_special_tokens is not False)

    # Likelihoods. `loglikelihood` itself is TemplateLM's: it moves a context's trailing spaces to the continuation and splits
    # the tokens of both together.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = [window(context, target, self.max_length) for _, context, target in requests]
        return self._score(windows, disable_tqdm, [key for key, _, _ in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, each token predicted once, in windows of `max_length`."""
        windows: list[Window] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            # Without BOS, which the prefix is already: the first token predicted is the text's own.
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, target = make_disjoint_window(pair)
                windows.append(window(context, target, self.max_length))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(
        self, windows: Sequence[Window], disable_tqdm: bool, keys: Sequence[Any] | None = None
    ) -> list[tuple[float, bool]]:
        """Scores in the order of `windows`; each goes to the harness' cache at once, for runs that are broken off."""
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(windows), desc="Scoring", disable=disable_tqdm) as progress:
            for group in by_inputs(windows):
                found = score_windows(self.engine, [windows[index] for index in group])
                for index, answer in zip(group, found, strict=True):
                    answers[index] = answer
                    if keys is not None:
                        self.cache_hook.add_partial("loglikelihood", keys[index], answer)
                progress.update(len(group))
        return [answers[index] for index in range(len(windows))]

    # Answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers that end before the first of the request's `until` strings; contexts too long are cut from the left."""
        params = [sampling_params(request.args[1], self.max_gen_toks, index) for index, request in enumerate(requests)]
        prompts = [
            cut_left(self.tok_encode(request.args[0]) or [self.prefix_token_id], self.max_length, one.max_new_tokens or 0)
            for request, one in zip(requests, params, strict=True)
        ]
        order = sorted(range(len(requests)), key=lambda index: -len(prompts[index]))
        answers: dict[int, str] = {}
        size = _ROUNDS * self.engine.executor.batch.max_sequences
        with tqdm(total=len(requests), desc="Answering", disable=disable_tqdm) as progress:
            for first in range(0, len(order), size):
                some = order[first : first + size]
                results = self.engine.generate([prompts[index] for index in some], [params[index] for index in some])
                for index, result in zip(some, results, strict=True):
                    specials = special_stops(self.engine.tokenizer, params[index].stop)
                    answers[index] = answer_text(self.engine.tokenizer, result, specials)
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                progress.update(len(some))
        return [answers[index] for index in range(len(requests))]

    # Chats

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a chat by the engine's template; without `add_generation_prompt` the last message is left open."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except EngineError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _log.warning("%s The system message is left out, as the harness does for other models.", error)
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        opened = messages[-1]["content"].lstrip()
        start = text.rfind(opened.rstrip())
        if start < 0:
            raise EngineError("eval", "the template changes the message that is to be continued", found=repr(opened[:80]))
        # Some templates strip messages, and what follows the text then is the template's own.
        return text[: start + len(opened if text.startswith(opened, start) else opened.rstrip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The engine's template, for the record of a run; it has one, whose name `chat_template` may say."""
        own = self.engine.manifest.prompt_template
        if isinstance(chat_template, str) and chat_template != own.name:
            raise EngineError("eval", "the prompt template", found=chat_template, expected=f"{own.name}, the engine's only one")
        return own.jinja if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template in the harness' cache of requests."""
        jinja = self.engine.manifest.prompt_template.jinja
        return f"belle-{_safe(self.engine.manifest.model.name)}-{hashlib.sha256(jinja.encode()).hexdigest()[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about the model into its results."""
        manifest, executor = self.engine.manifest, self.engine.executor
        assert isinstance(executor, ProfilableExecutor), "engines of programs are measured"
        return {
            "model_name": manifest.model.name,
            "model_num_parameters": manifest.model.parameters,
            "model_source_digests": dict(manifest.model.source_digests),
            "quantization": dict(manifest.quantization),
            "instruction_set": executor.isa,
            "threads": executor.threads,
            "max_length": self.max_length,
        }


def _safe(name: Iterable[str]) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
