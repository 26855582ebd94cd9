"""Stand-in until the package is merged."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    text: Any = None
    messages: Any = None
    token_ids: Any = None
    answer: str = ""
    line: int = 0


def open_set(path: Any) -> Any:
    import json
    import types

    r = [Request(token_ids=tuple(json.loads(l)["token_ids"])) for l in open(path)]
    return types.SimpleNamespace(digest="d", calibration=r, holdout=r[:4])
