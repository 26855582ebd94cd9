"""What llama.cpp knows about tokens without reading it from a GGUF file's metadata (src/llama-vocab.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SENTENCEPIECE = "llama"  # tokenizer.ggml.model of sentencepiece vocabularies, whatever the architecture
# Values of tokenizer.ggml.pre of Llama 3 and its relatives: they put BOS before plain text and ignore merges for whole words.
LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"})
TEKKEN = frozenset({"tekken"})  # of Mistral's later models; merges are ignored for whole words here too
_ADDS_BOS = LLAMA3 | TEKKEN | {"chameleon"}
# Ids of special tokens that the metadata of a sentencepiece vocabulary leaves out.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Tokens that end an answer, whatever the metadata says.
_ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
    _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>""".split()
)
# In vocabularies with both tokens of a pair, <|end|> ends a message and not the answer.
_ENDS_OF_MESSAGES = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"))

Get = Callable[..., Any]


def adds_bos(get: Get) -> bool:
    """Whether BOS goes before plain text."""
    model, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    return bool(get("tokenizer.ggml.add_bos_token", model == SENTENCEPIECE or pre in _ADDS_BOS))


def special_id(get: Get, kind: str) -> int | None:
    """The id of the special token of a kind (bos, eos, unknown, padding, eot, eom), from the metadata or implied."""
    tokens = get("tokenizer.ggml.tokens") or []
    implied = _SENTENCEPIECE_IDS.get(kind) if get("tokenizer.ggml.model") == SENTENCEPIECE else None
    stated = get(f"tokenizer.ggml.{kind}_token_id")
    usable = [index for index in (stated, implied) if type(index) is int and 0 <= index < len(tokens)]
    return usable[0] if usable else None


def ends_answer(token: str) -> bool:
    """Whether a token ends an answer by its text, and so is special whatever type the metadata gives it."""
    return token in _ENDS


def end_ids(get: Get) -> list[int]:
    """The ids that end an answer: those in the metadata, then those whose text says so, in the order of ids."""
    tokens: Sequence[str] = get("tokenizer.ggml.tokens") or []
    ids = [index for kind in ("eos", "eot", "eom") if (index := special_id(get, kind)) is not None]
    ends = {index: token for index, token in enumerate(tokens) if ends_answer(token)}
    if any(set(pair) <= set(ends.values()) for pair in _ENDS_OF_MESSAGES):
        ends = {index: token for index, token in ends.items() if token != "<|end|>"}
    return list(dict.fromkeys([*ids, *ends]))
