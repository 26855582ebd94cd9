"""The affinity key of a request: prompts that begin alike have one, so that they find a replica with their keys and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SYSTEM = ("system", "developer")


def affinity_key(body: bytes, chars: int) -> str:
    """Return 64 hexadecimal digits for the body of a request, or nothing where it has no prompt.

    In a chat these are all messages up to the first one of the user, of which `chars` characters count; otherwise the first
    `chars` characters, or token ids, of the prompt. The name of the model, which may be an adapter, and the salt of the prefix
    cache count too, because nothing is shared between different ones. Later messages of a chat do not count, so that all its
    turns have one key.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the server of a replica refuses it
    if not isinstance(request, dict):
        return ""
    beginning = _beginning(request, chars)
    if beginning is None:
        return ""
    identity = [request.get("model"), request.get("cache_salt"), beginning]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _beginning(request: Mapping[str, Any], chars: int) -> Any:
    messages = request.get("messages")
    if isinstance(messages, list) and messages:
        return _first_messages(messages, chars)
    prompt = request.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # of several prompts, which are sent together
    return prompt[:chars] if isinstance(prompt, (str, list)) and prompt else None


def _first_messages(messages: list[Any], chars: int) -> list[Any]:
    taken: list[Any] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role in _SYSTEM:
            taken.append([role, message.get("content")])
            continue
        content = message.get("content") if isinstance(message, dict) else message
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        taken.append([role, text[:chars]])
        break
    return taken
