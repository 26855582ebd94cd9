"""The fields that chats and completions share: how an answer is sampled, when it ends, and how it is delivered."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from belle_compile.runtime.server.schemas.fields import (
    Body,
    Only,
    SchemaOrText,
    TextOrTexts,
    Whole,
    bad_value,
    conflict,
    text_or_texts_schema,
    unsupported,
    wrong_type,
)
from belle_compile.runtime.serving.grammar.source import Grammar, Kind
from belle_compile.runtime.serving.request import (
    MAX_ANSWERS,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_SALT_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SamplingParams,
)
from belle_compile.runtime.serving.scheduling import LARGEST_PRIORITY

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
MOST_GUESSES = 1024  # tokens that prompt lookup guesses in a step; more never fit
_SEEDS = 2**64  # negative seeds count from here downwards


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type("an object of token ids and biases")
    for token in value:
        if not _TOKEN_ID.fullmatch(token):
            raise bad_value(f"token ids as keys, found {token[:40]!r}")
    return {int(token): bias for token, bias in value.items()}


Biases = Annotated[
    Any,
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_BIASES,
                },
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(Body):
    """What a stream has besides pieces of answers."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(None, False)] = None
    continuous_usage_stats: Annotated[Any, Only(None, False)] = None


class JsonSchemaFormat(Body):
    """A JSON schema that the answer follows. `name` and `description` change nothing; every schema is followed strictly."""

    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            found = "json_schema without a schema" if self.json_schema is None else f"{self.type} with a schema"
            raise conflict(f"Invalid value for 'response_format.json_schema': found {found}", "response_format.json_schema")
        return self


class StructuredOutputs(Body):
    """vLLM's field for the form of the answer."""

    json_: SchemaOrText = Field(None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    json_object: bool | None = None
    choice: Annotated[Any, Only(None)] = None
    structural_tag: Annotated[Any, Only(None)] = None
    disable_fallback: bool | None = None
    disable_any_whitespace: Annotated[Any, Only(None, False)] = None
    disable_additional_properties: Annotated[Any, Only(None, False)] = None
    whitespace_pattern: Annotated[Any, Only(None)] = None


class SamplingBody(Body):
    """Fields of OpenAI's API that change how an answer is generated, and vLLM's where OpenAI has none.

    A field that is null or left out has the engine's default. Fields in the last part are known and change no answer here.
    """

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Whole(-1)] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    n: Annotated[int, Whole(1, MAX_ANSWERS)] | None = None
    stop: Annotated[TextOrTexts, WithJsonSchema(text_or_texts_schema(MAX_STOPS, MAX_STOP_LENGTH))] = None
    stop_token_ids: list[Annotated[int, Whole(0)]] | None = Field(None, max_length=MAX_STOPS)
    seed: Annotated[int, Whole(-(2**63), 2**63 - 1)] | None = None
    logit_bias: Biases = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: Annotated[int, Whole(0)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Whole(0, MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = None
    grammar: str | None = None
    guided_json: SchemaOrText = None
    guided_regex: str | None = None
    guided_grammar: str | None = None

    parse_special: bool | None = None  # whether names of special tokens are these tokens: in chats not, in completions

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    cache_salt: str | None = Field(None, max_length=MAX_SALT_LENGTH)
    priority: Annotated[int, Whole(-LARGEST_PRIORITY, LARGEST_PRIORITY)] | None = None
    timeout: float | None = Field(None, gt=0)
    prompt_lookup: Annotated[int, Whole(0, MOST_GUESSES)] | None = None

    user: str | None = None

    # vLLM's names for what this server does not do. What asks for nothing passes.
    best_of: Annotated[int, Whole()] | None = None
    use_beam_search: Annotated[Any, Only(None, False)] = None
    length_penalty: Annotated[Any, Only(None, 1, 1.0)] = None
    early_stopping: Annotated[Any, Only(None, False)] = None
    bad_words: Annotated[Any, Only(None, [])] = None
    allowed_token_ids: Annotated[Any, Only(None)] = None
    include_stop_str_in_output: Annotated[Any, Only(None, False)] = None
    skip_special_tokens: Annotated[Any, Only(None, True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(None, True)] = None
    truncate_prompt_tokens: Annotated[Any, Only(None)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(None, False)] = None
    guided_choice: Annotated[Any, Only(None)] = None
    guided_whitespace_pattern: Annotated[Any, Only(None)] = None
    logits_processors: Annotated[Any, Only(None, [])] = None

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise conflict("'stream_options' is only allowed with 'stream'", "stream_options")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported(f"expected the number of answers, {self.n or 1}", "best_of")
        if len(given := self.grammar_sources()) > 1:
            raise conflict(f"'{given[1][0]}' cannot be combined with '{given[0][0]}'", given[1][0])
        return self

    def grammar_sources(self) -> list[tuple[str, Kind, str]]:
        """Return (field, kind of grammar, source) of each field that constrains the answer."""
        form, structured = self.response_format, self.structured_outputs
        schema = form.json_schema.json_schema if form and form.json_schema else None
        constraints: list[tuple[str, Kind, Any]] = [
            ("response_format", "json_object", "" if form and form.type == "json_object" else None),
            ("response_format", "json_schema", schema),
            ("structured_outputs", "json_object", "" if structured and structured.json_object else None),
            ("structured_outputs", "json_schema", structured.json_ if structured else None),
            ("structured_outputs", "regex", structured.regex if structured else None),
            ("structured_outputs", "lark", structured.grammar if structured else None),
            ("guided_json", "json_schema", self.guided_json),
            ("regex", "regex", self.regex),
            ("guided_regex", "regex", self.guided_regex),
            ("grammar", "lark", self.grammar),
            ("guided_grammar", "lark", self.guided_grammar),
        ]
        return [(field, kind, _source(value)) for field, kind, value in constraints if value is not None]

    def sampling(self, **more: Any) -> SamplingParams:
        """Return the parameters of the request, of which `more` are those that chats and completions name differently.

        Raises `EngineError` for values that the engine cannot have.
        """
        sources = self.grammar_sources()
        given = {
            "grammar": Grammar(*sources[0][1:]) if sources else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM's way of turning it off
            "min_p": self.min_p,
            "stop": self.stop,
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "seed": None if self.seed is None else self.seed % _SEEDS,
            "logit_bias": self.logit_bias,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "prompt_logprobs": self.prompt_logprobs,
            "prompt_lookup": self.prompt_lookup,
            "cache_salt": self.cache_salt,
            "n": self.n,
        } | more
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _source(value: dict[str, Any] | str) -> str:
    """Return a grammar's text. The order of a schema's keys is kept, for the answer follows it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
