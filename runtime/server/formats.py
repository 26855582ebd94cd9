"""OpenAI's objects for answers, whole and in chunks: of chats (`ChatFormat`) and of completions (`CompletionFormat`).

Chunks are most of what the server writes, so their JSON is made once for each choice, and the text of a piece is put into it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Any

from belle_compile.runtime.engine import Delta, Result
from belle_compile.runtime.server.calls import Call
from belle_compile.runtime.server.responses import to_json
from belle_compile.runtime.server.schemas.chat import ChatBody
from belle_compile.runtime.server.schemas.completions import CompletionBody
from belle_compile.runtime.server.token_texts import CompletionLogprobs
from belle_compile.runtime.serving.logprobs import TokenLogprob

DONE = b"data: [DONE]\n\n"
_TEXT = "\0"  # stands for the text in a chunk that is made in advance; no other string of a chunk has it
_quote = encode_basestring  # the C function behind json.dumps(text, ensure_ascii=False)


def event(data: bytes) -> bytes:
    """Return a server-sent event."""
    return b"data: " + data + b"\n\n"


class Format(ABC):
    """How the answers to one call are written."""

    object_name: str
    chunk_name: str
    silent = False  # whether no answer was asked for

    def __init__(self, call: Call[Any], id: str) -> None:
        served = call.served
        self._call, self._texts, self._tokenizer = call, served.token_texts, served.engine.tokenizer
        options = call.body.stream_options
        self.with_usage = bool(options and options.include_usage)
        self._top = call.body.alternatives
        self._facts = {"id": id, "created": call.created, "model": call.model, "system_fingerprint": served.fingerprint}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    @property
    def plain(self) -> bool:
        """Whether the chunk of a piece has nothing but its text."""
        return self._top is None and not self._call.body.return_token_ids

    @abstractmethod
    def opening(self, index: int, scores: Sequence[TokenLogprob | None] | None) -> bytes:
        """Return the events before the first piece of a choice; `scores` are those of the prompt's tokens."""

    @abstractmethod
    def response(self, results: Sequence[Result]) -> bytes:
        """Return the response with all choices."""

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """Return what holds the text of a piece in a chunk's choice."""

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[int], entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the object `logprobs` of a piece."""

    def cut(self, result: Result) -> Result:
        """Return what is sent of an answer."""
        return result

    def piece(self, index: int, text: str) -> bytes:
        """Return the event of a piece that is `plain`."""
        frame = self._frames.get(index)
        if frame is None:
            whole = self._chunk(index, self._content(_TEXT))
            before, _, after = whole.partition(_quote(_TEXT).encode())
            frame = self._frames[index] = (before, after)
        return frame[0] + _quote(text).encode() + frame[1]

    def scored_piece(self, index: int, delta: Delta) -> bytes:
        """Return the event of a piece with its tokens and log probabilities, where they were asked for."""
        more: dict[str, Any] = {}
        if delta.logprobs is not None:
            more["logprobs"] = self._logprobs(index, delta.token_ids, delta.logprobs)
        if self._call.body.return_token_ids:
            more["token_ids"] = delta.token_ids
        return self._chunk(index, self._content(delta.text), **more)

    def ending(self, index: int, result: Result) -> bytes:
        """Return the event after the last piece of a choice."""
        return self._chunk(index, self._content(""), finish_reason=result.finish_reason)

    def usage_event(self, results: Sequence[Result]) -> bytes:
        """Return the event with the usage of all choices."""
        return event(to_json({**self._envelope(self.chunk_name), "choices": [], "usage": self.usage(results)}))

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Count the tokens of each prompt once, and those of all answers, the tokens that end them included."""
        firsts = results[:: self._call.n]
        prompt = sum(len(result.prompt_token_ids) for result in firsts)
        completion = sum(len(result.token_ids) for result in results)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in firsts)},
        }

    def _envelope(self, name: str) -> dict[str, Any]:
        return {"object": name, **self._facts}

    def _chunk(self, index: int, content: dict[str, Any], beside: dict[str, Any] | None = None, **more: Any) -> bytes:
        """Return the event of a chunk with one choice; `more` are fields of the choice, `beside` are fields of the chunk."""
        choice = {"index": index, **content, "logprobs": None, "finish_reason": None, **more}
        usage = {"usage": None} if self.with_usage else {}
        return event(to_json({**self._envelope(self.chunk_name), "choices": [choice], **usage, **(beside or {})}))

    def _prompt_logprobs(self, scores: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
        top = self._call.body.prompt_logprobs
        return None if top is None or scores is None else self._texts.prompt_logprobs(scores, top)

    def _whole_response(self, choices: list[dict[str, Any]], results: Sequence[Result], **more: Any) -> bytes:
        whole = {**self._envelope(self.object_name), "choices": choices, "usage": self.usage(results), **more}
        return to_json(whole)


class ChatFormat(Format):
    """Chat completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    _call: Call[ChatBody]

    def opening(self, index: int, scores: Sequence[TokenLogprob | None] | None) -> bytes:
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, self._of_prompt(index, scores))

    def response(self, results: Sequence[Result]) -> bytes:
        choices = []
        for index, result in enumerate(results):
            choice: dict[str, Any] = {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": None,
                "finish_reason": result.finish_reason,
            }
            if result.logprobs is not None:
                choice["logprobs"] = self._logprobs(index, result.token_ids, result.logprobs)
            if self._call.body.return_token_ids:
                choice["token_ids"] = result.token_ids
            choices.append(choice)
        return self._whole_response(choices, results, **self._of_prompt(0, results[0].prompt_logprobs))

    def ending(self, index: int, result: Result) -> bytes:
        return self._chunk(index, {"delta": {}}, finish_reason=result.finish_reason)

    def _content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _logprobs(self, index: int, tokens: Sequence[int], entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._texts.chat_logprobs(entries, self._top or 0)

    def _of_prompt(self, index: int, scores: Sequence[TokenLogprob | None] | None) -> dict[str, Any]:
        """Return vLLM's fields about the prompt, which all choices share, where they were asked for."""
        fields: dict[str, Any] = {}
        if index == 0 and (scored := self._prompt_logprobs(scores)) is not None:
            fields["prompt_logprobs"] = scored
        if index == 0 and self._call.body.return_token_ids:
            fields["prompt_token_ids"] = self._call.requests[0].prompt
        return fields


class CompletionFormat(Format):
    """Text completions. With `max_tokens` 0, which asks for no answer, the one token of the engine's is left out."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    _call: Call[CompletionBody]

    def __init__(self, call: Call[CompletionBody], id: str) -> None:
        super().__init__(call, id)
        self.silent = call.body.max_tokens == 0
        self._scorers = [CompletionLogprobs(self._texts, self._top or 0) for _ in call.requests]

    def opening(self, index: int, scores: Sequence[TokenLogprob | None] | None) -> bytes:
        more = self._of_prompt(index, scores)
        if not self._call.body.echo and not more:
            return b""
        if self._call.body.echo and self._top is not None and scores is not None:
            more["logprobs"] = self._scorers[index].add(self._call.requests[index].prompt, scores)
        return self._chunk(index, self._content(self._echo(index)), **more)

    def response(self, results: Sequence[Result]) -> bytes:
        choices = []
        for index, result in enumerate(results):
            choice: dict[str, Any] = {
                "index": index,
                "text": self._echo(index) + result.text,
                "logprobs": self._all_logprobs(index, result),
                "finish_reason": result.finish_reason,
            }
            if self._call.body.return_token_ids:
                choice["token_ids"] = result.token_ids
            choices.append(choice | self._of_prompt(index, result.prompt_logprobs))
        return self._whole_response(choices, results)

    def cut(self, result: Result) -> Result:
        if not self.silent:
            return result
        return replace(result, text="", token_ids=[], logprobs=None if result.logprobs is None else [], finish_reason="length")

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, index: int, tokens: Sequence[int], entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._scorers[index].add(tokens, entries)

    def _all_logprobs(self, index: int, result: Result) -> dict[str, Any] | None:
        if result.logprobs is None:
            return None
        tokens: list[int] = result.token_ids
        entries: list[TokenLogprob | None] = [*result.logprobs]
        if self._call.body.echo and result.prompt_logprobs is not None:
            tokens, entries = result.prompt_token_ids + tokens, result.prompt_logprobs + entries
        return self._scorers[index].add(tokens, entries)

    def _echo(self, index: int) -> str:
        """The text of a choice's prompt if it is echoed."""
        if not self._call.body.echo:
            return ""
        prompt = self._call.prompts[index // self._call.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _of_prompt(self, index: int, scores: Sequence[TokenLogprob | None] | None) -> dict[str, Any]:
        """Return vLLM's fields about a choice's prompt, where they were asked for."""
        fields: dict[str, Any] = {}
        if (scored := self._prompt_logprobs(scores)) is not None:
            fields["prompt_logprobs"] = scored
        if self._call.body.return_token_ids:
            fields["prompt_token_ids"] = self._call.requests[index].prompt
        return fields
