"""Bodies of responses: OpenAI's objects, and vLLM's where OpenAI has none. Responses are dicts of these types."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

FinishReason = Literal["stop", "length"]


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: Error


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenScore(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenScore):
    top_logprobs: list[TokenScore]


class ChatLogprobs(TypedDict):
    content: list[ScoredToken]
    refusal: None


class PromptTokenScore(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenScore] | None]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[list[int]]


class TextChoice(TextChunkChoice):
    finish_reason: FinishReason  # type: ignore[misc]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChunkChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: NotRequired[str]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: int
    vocab_size: int
    chat_template: str


class Version(TypedDict):
    version: str


class EngineFacts(TypedDict):
    name: str
    target: str
    backend: str
    digest: str
    quantization: dict[str, object]
    kernels: str
    max_context: int
    vocab_size: int
    ranks: int
    parameters: int


class SamplingDefaults(TypedDict):
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


class Info(TypedDict):
    model: str
    version: str
    engine: EngineFacts
    defaults: SamplingDefaults
    report: str | None


class Stats(TypedDict):
    time: float
    uptime_s: float
    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: int
    generated_tokens: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    result_hits: int
    result_lookups: int
    preemptions: int
    ttft_p50_s: float | None
    tpot_p50_s: float | None
    e2e_p50_s: float | None


class EngineState(TypedDict):
    directory: str | None
    model: str
    digest: str
    self_test: str
    requests: int


class SwapState(TypedDict):
    current: EngineState
    loading: str | None
    previous: EngineState | None
    error: str | None
