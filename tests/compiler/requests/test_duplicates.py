"""What counts as said before."""

from __future__ import annotations

import random
from collections.abc import Sequence

from belle_compile.compiler.requests.duplicates import EXACT, NEAR, Duplicates, normalized, shared_beginning, shingles
from belle_compile.compiler.requests.request import Request
from tests.compiler.requests.samples import distinct_texts, jaccard


def judge(texts: Sequence[str], similarity: float = 0.8) -> list[str | None]:
    return Duplicates(similarity).judge([Request(text=text, line=line) for line, text in enumerate(texts, 1)])


def with_changes(text: str, count: int, chance: random.Random) -> str:
    characters = list(text)
    for place in chance.sample(range(len(characters)), count):
        characters[place] = "龘"
    return "".join(characters)


def test_distinct_texts_are_kept() -> None:
    assert judge(distinct_texts(2000)) == [None] * 2000


def test_exact_duplicates_differ_at_most_in_width_case_and_space() -> None:
    texts = ["Ｗhat  is IT？", " what is it?\n", "who is it", "what is it?"]
    assert judge(texts) == [None, EXACT, None, EXACT]
    assert normalized(texts[0]) == "what is it?"


def test_near_duplicates_are_dropped_and_others_kept() -> None:
    chance = random.Random(2)
    originals = distinct_texts(400, shortest=100, longest=300)
    near = [with_changes(text, 1, chance) for text in originals]
    other = [with_changes(text, len(text) // 4, chance) for text in originals]
    assert min(map(jaccard, originals, near)) > 0.9
    assert max(map(jaccard, originals, other)) < 0.6
    verdicts = judge([*originals, *near, *other])
    assert verdicts[:400] == [None] * 400
    assert verdicts[400:800].count(NEAR) >= 399  # one of a thousand may get through
    assert verdicts[800:] == [None] * 400


def test_similarity_moves_the_border() -> None:
    text = distinct_texts(1, shortest=120, longest=120)[0]
    changed = with_changes(text, 4, random.Random(3))
    assert 0.7 < jaccard(text, changed) < 0.85
    assert judge([text, changed], 0.95) == [None, None]
    assert judge([text, changed], 0.6) == [None, NEAR]
    assert judge([text, text + "。", text], 1.0) == [None, None, EXACT]


def test_the_estimate_is_close_to_the_overlap() -> None:
    """The library's MinHash, held against exact sets."""
    import rensa

    chance = random.Random(4)
    errors = []
    for text in distinct_texts(300, shortest=60, longest=300):
        changed = with_changes(text, chance.randrange(1, 12), chance)
        one, other = rensa.RMinHash(240, 1), rensa.RMinHash(240, 1)
        one.update(shingles(text))
        other.update(shingles(changed))
        errors.append(one.jaccard(other) - jaccard(text, changed))
    assert abs(sum(errors) / len(errors)) < 0.01
    assert max(map(abs, errors)) < 0.13


def test_batches_know_of_each_other() -> None:
    first, second = distinct_texts(2, shortest=100)
    duplicates = Duplicates(0.8)
    assert duplicates.judge([Request(text=first)]) == [None]
    assert duplicates.judge([Request(text=second), Request(text=first), Request(text=first + "。")]) == [None, EXACT, NEAR]


def test_a_chat_is_compared_without_its_system_message() -> None:
    system = "你是一个乐于助人的人工智能助手，请认真回答用户的所有问题，不知道时请直接说不知道。" * 3
    chats = [
        Request(messages=({"role": "system", "content": system}, {"role": "user", "content": question}))
        for question in ("写一首关于春天的诗", "北京的人口是多少", "写一首关于春天的诗")
    ]
    assert Duplicates(0.8).judge(chats) == [None, None, EXACT]
    assert Duplicates(0.8).judge([Request(text=(chat.messages or ())[1]["content"]) for chat in chats[:2]]) == [None, None]


def test_a_beginning_that_most_requests_share_is_not_compared() -> None:
    preamble = "".join(distinct_texts(1, shortest=900, longest=900))
    texts = [preamble + text for text in distinct_texts(200, seed=5)]
    assert min(jaccard(texts[0], text) for text in texts[1:]) > 0.6
    duplicates = Duplicates(0.8)
    verdicts = duplicates.judge([Request(text=text) for text in [*texts, f"{texts[0]}。", texts[3]]])
    assert verdicts[:200] == [None] * 200 and verdicts[201] == EXACT
    assert duplicates.shared_beginning == normalized(preamble)


def test_shared_beginnings() -> None:
    texts = {f"{'x' * 40}{number}" for number in range(60)}
    assert shared_beginning(texts) == ""  # too few to tell
    others = {f"{number} other" for number in range(59)}
    assert shared_beginning(texts | others) == "x" * 40
    assert shared_beginning(texts | others | {"a", "b"}) == ""  # no longer more than half
    assert shared_beginning({f"{'x' * 20}{number}" for number in range(99)}) == ""  # too short to matter


def test_token_ids() -> None:
    chance = random.Random(6)
    ids = [tuple(chance.randrange(250_880) for _ in range(200)) for _ in range(3)]
    changed = (*ids[0][:100], 7, *ids[0][101:])
    requests = [Request(token_ids=each) for each in (*ids, changed, ids[1], (5,))]
    assert Duplicates(0.8).judge(requests) == [None, None, None, NEAR, EXACT, None]


def test_short_texts() -> None:
    assert judge(["你好", "您好", "你好", "你", "hi"]) == [None, None, EXACT, None, None]
    assert shingles("你好") == ["你好"] and shingles("abcde") == ["abcd", "bcde"]
