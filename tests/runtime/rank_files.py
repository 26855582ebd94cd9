"""The files of a rank that belong together: weights, a program that knows their header, and kernels with the program's seal."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from belle_compile.runtime.program import PROGRAM_NAME, WEIGHTS_NAME, Program
from belle_compile.runtime.program_json import program_to_json, seal
from tests.runtime.test_memory import write_weights


def write_rank(rank: Path, program: Program, kernels: Mapping[str, bytes], weights: dict[str, np.ndarray]) -> None:
    """Write the files of a rank; `kernels` maps file names to libraries without a seal."""
    rank.mkdir(parents=True, exist_ok=True)
    data = write_weights(rank / WEIGHTS_NAME, weights).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = program_to_json(replace(program, weights_header=hashlib.sha256(data[: 8 + length]).hexdigest()))
    (rank / PROGRAM_NAME).write_text(text)
    for name, library in kernels.items():
        (rank / name).write_bytes(library + seal(text))


def change_program(rank: Path, old: str, new: str) -> None:
    """Replace text of program.json, and seal the kernels again."""
    text = (rank / PROGRAM_NAME).read_text()
    assert old in text
    (rank / PROGRAM_NAME).write_text(text.replace(old, new))
    for path in rank.glob("kernels-*"):
        path.write_bytes(path.read_bytes()[: -len(seal(""))] + seal(text.replace(old, new)))
