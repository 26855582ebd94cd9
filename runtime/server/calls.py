"""From the body of an HTTP request to resolved requests of the engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import VARIABLES
from belle_compile.runtime.server.context import RequestContext, context_of
from belle_compile.runtime.server.errors import ApiError, ClientGone, invalid, of_failure, of_request, of_validation
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.parsing import nested_too_deeply, parse_object
from belle_compile.runtime.server.schemas.chat import ChatBody
from belle_compile.runtime.server.schemas.completions import CompletionBody
from belle_compile.runtime.server.schemas.fields import Body
from belle_compile.runtime.server.served_engine import ServedEngine, served_by
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.adapters import UnknownAdapter
from belle_compile.runtime.serving.request import Request, SamplingParams
from belle_compile.runtime.serving.result_cache.options import CachePolicy
from belle_compile.runtime.serving.scheduling import LARGEST_PRIORITY, Scheduling

B = TypeVar("B", bound=Body)
T = TypeVar("T")
C = TypeVar("C", ChatBody, CompletionBody)

# Bodies up to this size are read on the event loop: a thread costs more than the milliseconds that they take.
_READ_AT_ONCE_BYTES = 4096
_GRAMMAR_FIELD = re.compile(rb'"(response_format|structured_outputs|regex|grammar|guided_\w+)"')
STAGES_OF_REQUESTS = frozenset({"prompt", "request", "sampling"})  # of errors that are the client's
MOST_CHOICES = 1024  # answers of one HTTP request: prompts times n


@dataclass(frozen=True)
class Call(Generic[C]):
    """An HTTP request for answers: its body, and one request of the engine for each choice, prompt by prompt."""

    body: C
    served: ServedEngine
    model: str
    prompts: Sequence[str | Sequence[int]]  # as they were given, those of chats as token ids
    requests: Sequence[Request]
    cache: CachePolicy
    scheduling: Scheduling
    context: RequestContext
    created: int  # seconds since the epoch

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.body.n or 1


async def read_body(request: HttpRequest) -> bytes:
    """Return the body of a request, whose type must be JSON: pages of other origins can send other types unasked."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"Invalid Content-Type: expected application/json, found {content_type[:80] or 'none'}."
        raise invalid(message, None, "invalid_content_type")
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGone from None


def validate(schema: type[B], body: bytes) -> B:
    """Return a body as an object of its schema, or raise `ApiError`."""
    fields = parse_object(body)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error) from None
    except RecursionError:
        raise nested_too_deeply() from None


async def read_call(service: Service, request: HttpRequest, schema: type[C]) -> Call[C]:
    """Read a request for answers and resolve it; raises `ApiError` where it cannot be answered.

    Long prompts are encoded and grammars compiled on another thread, so that nobody waits for them but their request.
    """
    data = await read_body(request)
    context, served = context_of(request.scope), served_by(request.scope)
    cache = _cache_policy(request.headers.get("cache-control", ""))
    at_once = len(data) <= _READ_AT_ONCE_BYTES and not _GRAMMAR_FIELD.search(data)
    if at_once and not served.engine.chat.may_take_long(data):
        call = _make_call(served, schema, data, context, cache)
    else:
        context.settle()
        call = await service.aside(lambda: _make_call(served, schema, data, context, cache))
    service.metrics.asked(call.n, call.body.answer_limit)
    return call


async def read_aside(
    service: Service, request: HttpRequest, schema: type[B], function: Callable[[ServedEngine, B], T], *, aside: bool = False
) -> T:
    """Return what `function` makes of the request's engine and body. A large body is read on another thread, and any if
    `function` takes long (`aside`)."""
    data = await read_body(request)
    served = served_by(request.scope)
    if not aside and len(data) <= _READ_AT_ONCE_BYTES and not served.engine.chat.may_take_long(data):
        return function(served, validate(schema, data))
    return await service.aside(lambda: function(served, validate(schema, data)))


def _make_call(served: ServedEngine, schema: type[C], data: bytes, context: RequestContext, cache: CachePolicy) -> Call[C]:
    body = validate(schema, data)
    context.model = model = served.model(body.model)
    options = served.options
    if (body.n or 1) > options.max_n:
        raise invalid(f"Invalid value for 'n': expected at most {options.max_n}.", "n")
    prompts, requests = resolve(served, body)
    return Call(body, served, model, prompts, requests, cache, _scheduling(options, body, context), context, int(time.time()))


def resolve(served: ServedEngine, body: ChatBody | CompletionBody) -> tuple[Sequence[str | Sequence[int]], list[Request]]:
    """Return the prompts, and the engine's requests for all choices."""
    engine, field = served.engine, body.prompt_field
    _check_counts(served.options, body)
    prompts, variables = _given(served, body)
    requests: list[Request] = []
    try:
        params = _sampling(body)
        if served.is_adapter(body.model):
            params = replace(params, adapter=body.model)
        for prompt in prompts:
            ids = engine.encode(prompt, raw=True, parse_special=body.parse_special, chat_template_kwargs=variables)
            _check_length(engine.max_context, body, len(ids))
            requests += engine.resolve(ids, params).answers(params.n)
    except EngineError as error:
        raise _refusal(served, error, body, field) from None
    except RecursionError:
        raise nested_too_deeply() from None
    return prompts, requests


def _given(served: ServedEngine, body: ChatBody | CompletionBody) -> tuple[list[Any], Mapping[str, Any]]:
    """The prompts of a body, and the variables of the prompt template that they have."""
    if isinstance(body, ChatBody):
        return [[message.for_template() for message in body.messages]], served.variables_of(body.chat_template_kwargs)
    return body.prompt, {}


def _check_counts(options: ServerOptions, body: ChatBody | CompletionBody) -> None:
    """Raise `ApiError` for more prompts, messages or answers than the server's options allow."""
    field = body.prompt_field
    if isinstance(body, ChatBody):
        most, count, prompts = options.max_messages, len(body.messages), 1
    else:
        most = options.max_prompts
        count = prompts = len(body.prompt)
    if count > most:
        raise invalid(f"Invalid value for '{field}': expected at most {most}, found {count}.", field)
    n = body.n or 1
    if n > options.max_n:
        raise invalid(f"Invalid value for 'n': expected at most {options.max_n}, found {n}.", "n")
    if n * prompts > MOST_CHOICES:
        found = f"{n} answers to each of {prompts} prompts"
        raise invalid(f"Invalid value for 'n': expected at most {MOST_CHOICES} answers in all, found {found}.", "n")


def _sampling(body: ChatBody | CompletionBody) -> SamplingParams:
    alternatives, limit = body.alternatives, body.answer_limit
    scored = [top for top in (body.prompt_logprobs, alternatives if body.echoes else None) if top is not None]
    # An answer has at least one token; `max_tokens` 0, which asks for none, leaves it out of the response.
    longest = None if limit is None else max(1, limit)
    more = {"max_new_tokens": longest, "logprobs": alternatives, "prompt_logprobs": max(scored, default=None)}
    return body.sampling(**more)


def _check_length(capacity: int, body: ChatBody | CompletionBody, prompt_tokens: int) -> None:
    """Raise OpenAI's error for a prompt and an answer that are too long together."""
    field, answer = body.prompt_field, max(1, body.answer_limit or 1)
    if prompt_tokens + answer <= capacity:
        return
    fits = prompt_tokens < capacity
    message = (
        f"This model's maximum context length is {capacity} tokens. However, you requested {prompt_tokens + answer} tokens "
        f"({prompt_tokens} in the {field}, {answer} in the completion). "
        f"Please reduce the length of the {field if not fits else f'{field} or completion'}."
    )
    raise ApiError(400, message, param=body.limit_field if fits else field, code="context_length_exceeded")


def _refusal(served: ServedEngine, error: EngineError, body: ChatBody | CompletionBody, field: str) -> ApiError:
    """Return what a client is told of a request that the engine refuses, with the field of the body that it is about."""
    if isinstance(error, UnknownAdapter):  # it was unloaded just now
        return served.unknown_model(str(body.model))
    if error.stage not in STAGES_OF_REQUESTS:  # such as a tokenizer that does not work
        return of_failure(error)
    names = {"max_new_tokens": body.limit_field}
    if sources := body.grammar_sources():
        names["grammar"] = sources[0][0]
    name = names.get(error.what, error.what)
    if error.what == VARIABLES:
        return of_request(error, VARIABLES, subject="")
    if error.stage == "sampling" and (name in names.values() or name in type(body).model_fields):
        return of_request(error, name, subject="")
    return of_request(error, field, subject=error.what)


def _scheduling(options: ServerOptions, body: ChatBody | CompletionBody, context: RequestContext) -> Scheduling:
    timeouts = [timeout for timeout in (body.timeout, options.request_timeout_s) if timeout is not None]
    priority = (body.priority or 0) + context.priority
    priority = max(-LARGEST_PRIORITY, min(LARGEST_PRIORITY, priority))
    return Scheduling(priority, min(timeouts, default=None), context.client)


def _cache_policy(header: str) -> CachePolicy:
    directives = {directive.strip().lower() for directive in header.split(",")}
    return CachePolicy("no-cache" in directives, "no-store" in directives)
