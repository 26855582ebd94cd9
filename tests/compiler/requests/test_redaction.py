"""What is personal data and what only looks like it."""

from __future__ import annotations

from collections import Counter

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.redaction import redact, redact_text
from belle_compile.compiler.requests.request import Request

# Numbers that check but belong to nobody: birthdays of 1949 and 1880, as in GB 11643's own examples.
ID, ID_WITH_X = "440524188001010014", "11010519491231002X"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我的手机号是13812345678，请回电", "我的手机号是[PHONE]，请回电"),
        ("+86 138 1234 5678", "[PHONE]"),
        ("0086-138-1234-5678或8613812345678", "[PHONE]或[PHONE]"),
        ("電話１３８１２３４５６７８。", "電話[PHONE]。"),
        ("座机010-65529988转3", "座机[PHONE]转3"),
        ("（０２１）６２３４５６７８", "[PHONE]"),
        ("0755 2653 1234, 03728123456", "[PHONE], [PHONE]"),
        ("客服400-820-8820", "客服[PHONE]"),
        ("call (415) 555-2671 or 415-555-2671.", "call [PHONE] or [PHONE]."),
        ("London +44 20 7946 0958!", "London [PHONE]!"),
        ("+1 (212) 555-0187", "[PHONE]"),
        ("写信给zhang.san+x@mail.example.com.cn。", "写信给[EMAIL]。"),
        ("a_b@example.org,c@example.net", "[EMAIL],[EMAIL]"),
        ("13812345678@example.com", "[EMAIL]"),
        ("用户＠example.com x＠example.com", "用户＠example.com [EMAIL]"),
        (f"身份证{ID}号", "身份证[ID]号"),
        (f"{ID_WITH_X}/{ID_WITH_X.lower()}", "[ID]/[ID]"),
        ("110105 19491231 002X", "[ID]"),
        ("ＩＤ：１１０１０５１９４９１２３１００２Ｘ", "ＩＤ：[ID]"),
    ],
)
def test_redacted(text: str, expected: str) -> None:
    assert redact_text(text, Counter()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "一共有12345678901个",  # no mobile number begins with 12
        "圆周率3.14159265358979",
        "1.13812345678 和 1,13812345678",
        "1381234567",
        "138123456789",
        "2023-04-15 12:30:00",
        "二进制01010101010",
        "123-456-7890",
        "ISBN 978-7-115-48935-6",
        "440524188001010015",  # wrong check digit
        "110105194913310026",  # no such day
        "4405241880010100145",
        "5+12345678=? x+12345678",
        "192.168.100.200",
        "@张三 你好 a@b",
        "price: 1000-2000 yuan, 800 people",
    ],
)
def test_left_as_it_is(text: str) -> None:
    counts: Counter[str] = Counter()
    assert redact_text(text, counts) == text and counts.total() == 0


def test_all_parts_of_a_request_and_counts() -> None:
    request = Request(
        messages=({"role": "user", "content": "a@example.com 13812345678"}, {"role": "user", "content": ID}),
        answer="13912345678",
        labels={"from": "b@example.com", "kind": "mail"},
        line=4,
    )
    redacted, counts = redact(request)
    assert redacted == Request(
        messages=({"role": "user", "content": "[EMAIL] [PHONE]"}, {"role": "user", "content": "[ID]"}),
        answer="[PHONE]",
        labels={"from": "[EMAIL]", "kind": "mail"},
        line=4,
    )
    assert counts == {"email": 2, "phone": 2, "id": 1}


def test_token_ids_cannot_be_redacted() -> None:
    with pytest.raises(CompileError, match=r"line 8: found token ids, .*expected text or messages; redact them before"):
        redact(Request(token_ids=(1, 2), line=8))


def test_long_texts_take_linear_time() -> None:
    counts: Counter[str] = Counter()
    text = "1" * 100_000 + "a" * 100_000 + "a." * 50_000 + "+1" * 50_000 + "1-" * 50_000
    assert redact_text(text, counts) == text
