"""Streaming text: the pieces add up, characters stay whole, stop strings are cut."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.tokenizer import Detokenizer, StopStrings, Tokenizer
from tests.runtime.fakes import byte_tokenizer, sentencepiece_tokenizer, special_tokens

BYTES = Tokenizer(byte_tokenizer(), special_tokens())
SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer(), special_tokens())
SHORTCUTS = {byte_tokenizer: BYTES, sentencepiece_tokenizer: SENTENCEPIECE}
TEXTS = st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=30)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@settings(deadline=None)
@given(text=TEXTS)
def test_pieces_add_up_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert pieces[-1] == "" and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_a_long_text_is_encoded_as_a_short_one_is(make: Callable[[], tokenizers.Tokenizer]) -> None:
    text = "Hello 你好, <s>  wörld\r\n" * 400
    tokenizer, ids = Tokenizer(make(), special_tokens()), make().encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_bos=False) == ids
    assert tokenizer.encode(text, add_bos=True) == [special_tokens().bos, *ids]


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    turns, encoded = 0, threading.Event()

    def encode() -> None:
        BYTES.encode("hello world " * 50_000)
        encoded.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not encoded.is_set():
        turns += 1
        time.sleep(0.001)
    thread.join()
    assert turns > 10, "the library held Python's lock"


class WithoutShortcut(Tokenizer):
    """Decodes every token with its neighbours."""

    def settled_text(self, token: int) -> str | None:
        return None


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
@settings(deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 310), st.sampled_from([2, 13, 231, 192, 163, 259, 260, 261, 262])), max_size=40))
def test_tokens_that_need_no_decoding_have_the_same_text(make: Callable[[], tokenizers.Tokenizer], ids: list[int]) -> None:
    assert stream(SHORTCUTS[make], ids) == stream(WithoutShortcut(make(), special_tokens()), ids)


def test_which_tokens_need_no_decoding() -> None:
    named = {name: SENTENCEPIECE._tokenizer.token_to_id(name) for name in ("▁Hello", "▁", "好", "<0x41>", "</s>")}
    assert {name: SENTENCEPIECE.settled_text(token) for name, token in named.items()} == {
        "▁Hello": " Hello", "▁": " ", "好": "好", "<0x41>": None, "</s>": "",
    }  # fmt: skip
    (letter,) = BYTES.encode("x")
    assert BYTES.settled_text(letter) == "x" and BYTES.settled_text(byte_ids("好")[0]) is None
    other = byte_tokenizer()
    other.decoder = tokenizers.decoders.WordPiece()
    assert Tokenizer(other, special_tokens()).settled_text(letter) is None


def test_a_panic_of_the_library_is_a_sentence() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 0, 1)])
    broken = Tokenizer(tokenizer, special_tokens())
    with pytest.raises(EngineError, match=r"^tokenizer: tokens cannot be converted: found index out of bounds.*; rebuild"):
        broken.decode([])  # fused to an empty text, of which the library strips a character


def test_chinese_comes_with_its_last_byte() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_vocabulary(), []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = Tokenizer(tokenizer, special_tokens())
    assert stream(bare, bare.encode("你a好")) == ["", "", "你", "a", "", "", "好", ""]


def byte_vocabulary() -> dict[str, int]:
    return {char: index for index, char in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def test_token_that_ends_one_character_and_begins_the_next() -> None:
    """BLOOM's merges cross characters; the finished one does not wait for the other."""
    vocabulary = byte_vocabulary()
    first, across, last = byte_chars("你")[:2], byte_chars("你")[2] + byte_chars("好")[0], byte_chars("好")[1:]
    for piece in (first, across, last):
        vocabulary[piece] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    ids = [vocabulary[piece] for piece in (first, across, last)]
    assert stream(Tokenizer(tokenizer, special_tokens()), ids) == ["", "你", "好", ""]


def byte_chars(text: str) -> str:
    """ByteLevel's printable characters for the bytes of a text."""
    normalized: str = tokenizers.normalizers.ByteLevel().normalize_str(text)
    return normalized


def test_sentencepiece_keeps_the_spaces_between_words() -> None:
    ids = [SENTENCEPIECE._tokenizer.token_to_id(piece) for piece in ("▁Hello", "▁world", "▁", "▁world", "!")]
    assert stream(SENTENCEPIECE, ids) == ["Hello", " world", " ", " world", "!", ""]


def test_special_token_between_words_costs_no_space() -> None:
    ids = [SENTENCEPIECE._tokenizer.token_to_id(piece) for piece in ("▁Hello", "</s>", "▁world")]
    assert stream(SENTENCEPIECE, ids) == ["Hello", "", " world", ""]


def test_unfinished_character_shows_at_the_end() -> None:
    assert stream(BYTES, byte_ids("好")[:2]) == ["", "", "\ufffd"]


def byte_ids(text: str) -> list[int]:
    return [BYTES._tokenizer.token_to_id(char) for char in byte_chars(text)]


def test_what_never_becomes_text_is_not_held_for_ever() -> None:
    lonely = byte_ids("好")[1]
    pieces = stream(BYTES, [lonely] * 20)
    assert "".join(pieces) == BYTES.decode([lonely] * 20)
    assert any(pieces[:12])


def test_bos_is_added_once_and_only_where_wanted() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), special_tokens(add_bos=True))
    assert tokenizer.encode("hello")[0] == 1 and tokenizer.encode("hello")[1] != 1
    assert tokenizer.encode("<s>hello") == tokenizer.encode("hello")
    assert BYTES.encode("hello")[0] != 1
    assert tokenizer.encode("hello", add_bos=False) == BYTES.encode("hello")
    assert BYTES.encode("hello", add_bos=True) == tokenizer.encode("hello")


def test_saved_truncation_and_padding_are_off() -> None:
    raw = byte_tokenizer()
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    assert Tokenizer(raw, special_tokens()).encode("assistant: user") == BYTES.encode("assistant: user")


def test_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(EngineError, match=r"tokenizer\.json is no tokenizer: found .*; rebuild"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", special_tokens())


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=20),
    cuts=st.lists(st.integers(0, 20)),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_wherever_the_borders_are(text: str, cuts: list[int], stops: list[str]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop = StopStrings(stops)
    out = ""
    for first, last in itertools.pairwise(borders):
        out += stop.push(text[first:last])
        if stop.matched:
            break
    starts = [text.index(s) for s in stops if s in text]
    assert stop.matched == bool(starts)
    if stop.matched:
        # The first stop string to be complete wins, so one that begins earlier but ends later may be cut by another.
        ends = min(text.index(s) + len(s) for s in stops if s in text)
        assert text.startswith(out) and len(out) < ends and not any(s in out for s in stops)
    else:
        assert out + stop.flush() == text


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["Human:"])
    assert [stop.push(piece) for piece in ("Hi\nHu", "ma", "t Human", ": x")] == ["Hi\n", "", "Humat ", ""]
    assert stop.matched


SPECIAL = {"<s>": 1, "</s>": 2, "<|im_end|>": 7}


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["</s>"], ["a", "b", 2, "c"], "ab"),
        (["<|im_end|>\nuser"], ["a", 7, "\n", "us", "er", "b"], "a"),
        (["b</s><s>"], ["a", "b", 2, 1], "a"),
        (["</s></s>"], ["a", 2, "b", 2, 2], "ab"),
        (["</s>", "bc"], ["a", "b", "c", 2], "a"),
        (["bc", "</s>x"], ["a", "b", 2, "c"], "a"),  # the text has no special tokens in it
        (["x</s>"], ["a", "x", "</", "s>"], "a"),  # the name, written as text
        (["<s></s>", "<|im_end|>"], ["a", 1, "b", 7, "c"], "ab"),
    ],
)  # fmt: skip
def test_special_tokens_in_stop_strings(stops: list[str], pieces: list[str | int], expected: str) -> None:
    stop, out = StopStrings(stops, SPECIAL), ""
    for piece in pieces:
        out += stop.push(piece) if isinstance(piece, str) else stop.push("", piece)
        if stop.matched:
            break
    assert stop.matched and out == expected


@pytest.mark.parametrize("stops", [["im_end"], ["s>"], ["<"], ["<s>"], ["a</s>"], ["</s>c", "<s></s>"]])
def test_special_tokens_that_no_stop_string_has_whole(stops: list[str]) -> None:
    stop = StopStrings(stops, SPECIAL)
    out = "".join(
        stop.push(piece, token) for piece, token in [("a", 5), ("b", 6), ("", 2), ("", 7), ("", 7), ("c", 5), ("", 2)]
    )
    assert not stop.matched and out + stop.flush() == "abc"


@settings(deadline=None)
@given(
    tokens=st.lists(st.sampled_from(["a", "b", "ab", 1, 2]), max_size=12),
    stops=st.lists(
        st.lists(st.sampled_from(["a", "b", "<s>", "</s>"]), min_size=1, max_size=3).map("".join), min_size=1, max_size=3
    ),
)
def test_special_tokens_in_stop_strings_wherever_they_are(tokens: list[str | int], stops: list[str]) -> None:
    """As soon as the text, with or without the names of special tokens, has a stop string, the answer ends before it."""
    stop, named, plain, out = StopStrings(stops, SPECIAL), "", "", ""
    for token in tokens:
        named += token if isinstance(token, str) else {1: "<s>", 2: "</s>"}[token]
        plain += token if isinstance(token, str) else ""
        out += stop.push(token, 5) if isinstance(token, str) else stop.push("", token)
        assert stop.matched == any(s in named or s in plain for s in stops)
        assert plain.startswith(out)
        if stop.matched:
            assert not any(s in out for s in stops)
            return
    assert out + stop.flush() == plain


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_the_bytes_of_tokens_are_those_of_the_text(make: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(make(), special_tokens())
    ids = tokenizer.encode("Hello 你好, 🙂!")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == "Hello 你好, 🙂!"
    assert any(tokenizer.token_bytes(token).decode(errors="replace") == "\ufffd" for token in ids), "a part of a character"
    assert tokenizer.token_bytes(2) == b"</s>" and tokenizer.is_special(2) and not tokenizer.is_special(ids[-1])
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([1, *ids], special=True).startswith("<s>") and not tokenizer.decode([1, *ids]).startswith("<s>")
