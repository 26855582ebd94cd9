"""POST /tokenize, POST /detokenize and GET /tokenizer_info, which are vLLM's."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import VARIABLES
from belle_compile.runtime.server.calls import STAGES_OF_REQUESTS, read_aside
from belle_compile.runtime.server.errors import invalid, of_failure, of_request
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.responses import DetokenizedText, TokenizerInfo, Tokens
from belle_compile.runtime.server.schemas.tokens import DetokenizeBody, TokenizeBody
from belle_compile.runtime.server.served_engine import ServedEngine, served_by
from belle_compile.runtime.server.service import Service

router = APIRouter()


@router.post("/tokenize", **operation("Encode a text or a chat.", Tokens, body=TokenizeBody))
async def tokenize(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(await read_aside(service, request, TokenizeBody, _tokenize))


@router.post("/detokenize", **operation("Decode token ids.", DetokenizedText, body=DetokenizeBody))
async def detokenize(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(await read_aside(service, request, DetokenizeBody, _detokenize))


@router.get("/tokenizer_info", **operation("Show the tokenizer's special tokens and the chat template.", TokenizerInfo))
async def tokenizer_info(request: HttpRequest) -> Response:
    return json_response(_tokenizer_info(served_by(request.scope)))


def _tokenize(served: ServedEngine, body: TokenizeBody) -> Tokens:
    served.model(body.model)
    chat, add_bos = served.engine.chat, False if body.add_special_tokens is False else None
    try:
        if body.messages is None:
            tokens = chat.encode_text(body.prompt or "", parse_special=body.parse_special is not False, add_bos=add_bos)
        else:
            if len(body.messages) > served.options.max_messages:
                found = f"expected at most {served.options.max_messages}, found {len(body.messages)}"
                raise invalid(f"Invalid value for 'messages': {found}.", "messages")
            tokens = chat.encode(
                [message.for_template() for message in body.messages],
                parse_special=body.parse_special is True,
                add_generation_prompt=body.add_generation_prompt is not False,
                add_bos=add_bos,
                variables=served.variables_of(body.chat_template_kwargs),
            )
    except EngineError as error:
        if error.stage not in STAGES_OF_REQUESTS:
            raise of_failure(error) from None
        if error.what == VARIABLES:
            raise of_request(error, VARIABLES, subject="") from None
        raise of_request(error, "prompt" if body.messages is None else "messages", subject=error.what) from None
    texts = [served.token_texts.lookup(token)[0] for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": served.engine.max_context, "tokens": tokens, "token_strs": texts}


def _detokenize(served: ServedEngine, body: DetokenizeBody) -> DetokenizedText:
    served.model(body.model)
    vocab_size = served.engine.executor.vocab_size
    if body.tokens and (largest := max(body.tokens)) >= vocab_size:
        found = str(largest)[:40]
        raise invalid(f"Invalid value for 'tokens': expected token ids of 0 to {vocab_size - 1}, found {found}.", "tokens")
    return {"prompt": served.engine.tokenizer.decode(body.tokens, special=True)}


def _tokenizer_info(served: ServedEngine) -> TokenizerInfo:
    engine = served.engine
    special, template = engine.manifest.special_tokens, engine.manifest.prompt_template
    name_of: Callable[[int], str] = lambda token: served.token_texts.lookup(token)[0]  # noqa: E731
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if special.bos is None else name_of(special.bos),
        "eos_token": name_of(special.eos[0]) if special.eos else None,
        "pad_token": None if special.pad is None else name_of(special.pad),
        "add_bos_token": special.add_bos,
        "add_eos_token": False,
        "model_max_length": engine.max_context,
        "vocab_size": engine.executor.vocab_size,
        "chat_template": template.jinja,
    }
