"""Replace e-mail addresses, ID numbers and phone numbers in requests before anything is stored.

Patterns cannot know what a number means, so they redact too much rather than too little: every number in the form of a phone
number is replaced, even if it was the operand of a sum. Names and postal addresses are not replaced.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import date

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.request import STAGE, Request

# Full-width digits and signs, as Chinese input methods write them. One character maps to one, so that positions are kept.
_HALF_WIDTH = str.maketrans("０１２３４５６７８９＠＋－．（）ｘＸ　", "0123456789@+-.()xX ")

_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[a-z0-9](?:[a-z0-9-]{0,62})\.){1,8}[a-z]{2,24}(?![a-z0-9-])", re.A | re.I)

# Number of a resident identity card (GB 11643): region, birthday, order, check digit; often written in groups.
_ID = re.compile(r"(?<![0-9])([1-9][0-9]{5})([ -]?)((?:18|19|20)[0-9]{6})\2([0-9]{3}[0-9Xx])(?![0-9A-Za-z])", re.A)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_AREA = r"0(?:10|2[0-9]|[3-9][0-9]{2})"
_PHONES = (
    r"(?:\+ ?|00)?(?:86[ -]?)?1[3-9][0-9]([ -]?)[0-9]{4}\1[0-9]{4}",  # Chinese mobile
    rf"(?:(?:\+ ?|00)86[ -]?)?(?:\({_AREA}\) ?|{_AREA}[ -]?)[2-9][0-9]{{2,3}}[ -]?[0-9]{{4}}",  # Chinese fixed line
    r"[48]00[ -](?:[0-9]{3}[ -][0-9]{4}|[0-9]{4}[ -][0-9]{3})",  # Chinese service number
    r"(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-.][0-9]{4}",  # North America
    r"(?<![A-Za-z)+])\+[1-9][0-9]{0,2}(?:[ .-]?\(?[0-9]{1,4}\)?){2,5}",  # international
)
_PHONE = re.compile(rf"(?<![0-9])(?<![0-9][.,])(?:{'|'.join(_PHONES)})(?![0-9])", re.A)
_FEWEST_INTERNATIONAL, _MOST_INTERNATIONAL = 8, 15  # digits of an international number (E.164)


def redact(request: Request) -> tuple[Request, Counter[str]]:
    """Replace personal data by placeholders, and count these by kind, as in {"phone": 1, "email": 2, "id": 0}.

    Text, messages, answer and labels are searched. Raises CompileError for token ids, which cannot be searched.
    """
    if request.token_ids is not None:
        raise CompileError(
            STAGE,
            f"line {request.line}",
            found="token ids, in which personal data cannot be found",
            expected="text or messages",
            remedy="redact them before they become tokens, or leave --redact out",
        )
    counts: Counter[str] = Counter()
    redacted = Request(
        text=None if request.text is None else redact_text(request.text, counts),
        messages=None
        if request.messages is None
        else tuple({**message, "content": redact_text(message["content"], counts)} for message in request.messages),
        answer=redact_text(request.answer, counts),
        labels={name: redact_text(value, counts) for name, value in request.labels.items()},
        line=request.line,
    )
    return redacted, counts


def redact_text(text: str, counts: Counter[str]) -> str:
    """Replace personal data by [EMAIL], [ID] and [PHONE]; adds the number of replacements to `counts`."""
    for kind, pattern, valid in (("email", _EMAIL, None), ("id", _ID, _is_id), ("phone", _PHONE, _is_phone)):
        plain = text.translate(_HALF_WIDTH) if not text.isascii() else text
        matches = [match for match in pattern.finditer(plain) if valid is None or valid(match)]
        counts[kind] += len(matches)
        for match in reversed(matches):
            text = f"{text[: match.start()]}[{kind.upper()}]{text[match.end() :]}"
    return text


def _is_id(match: re.Match[str]) -> bool:
    """Whether birthday and check digit (ISO 7064 MOD 11-2) are valid, as they hardly ever are in another 18-digit number."""
    digits = "".join(match.group(1, 3, 4)).upper()
    try:
        date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(digits, _ID_WEIGHTS, strict=False))
    return digits[17] == "10X98765432"[total % 11]


def _is_phone(match: re.Match[str]) -> bool:
    """Whether an international number has as many digits as E.164 allows; the other patterns fix their number of digits."""
    digits = sum(character.isdigit() for character in match.group())
    return not match.group().startswith("+") or _FEWEST_INTERNATIONAL <= digits <= _MOST_INTERNATIONAL
