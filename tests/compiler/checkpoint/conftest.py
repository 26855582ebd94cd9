"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.compiler.checkpoint.models import write_llama

torch.set_num_threads(1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A complete LLaMA directory with model.safetensors."""
    return write_llama(tmp_path / "llama")
