"""Tiny checkpoints whose rows are whole blocks of Q8_0, requests for them, and exports of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from belle_compile.compiler.exports import driver
from belle_compile.compiler.exports.request import ExportRequest
from tests.parity.variants import VARIANTS, make_bloom, make_llama, random_ids


def llama(directory: Path, **changes: Any) -> Path:
    """A LLaMA with grouped heads whose widths are multiples of 32."""
    directory.mkdir(parents=True)
    return make_llama(directory, **{"num_key_value_heads": 2, "intermediate_size": 96} | changes)


def relative(directory: Path, variant: str, **changes: Any) -> Path:
    """A variant of a relative of LLaMA, with widths that are multiples of 32."""
    directory.mkdir(parents=True)
    return VARIANTS[variant](directory, **{"intermediate_size": 96, **changes})  # type: ignore[call-arg]  # config values


def bloom(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True)
    return make_bloom(directory, **changes)


def requests(checkpoint: Path, count: int = 10, length: int = 24) -> Path:
    """A file of requests of random tokens, beside the checkpoint."""
    file = checkpoint.with_suffix(".jsonl")
    lines = [json.dumps({"token_ids": random_ids(checkpoint, length, seed)}) for seed in range(count)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def export(source: Path, format: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """Export to a new folder beside the source; returns the folder and the record."""
    out = source.parent / f"{source.name}-{format}-{len(list(source.parent.iterdir()))}"
    return out, driver.export(ExportRequest(source, out, format, **options))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
