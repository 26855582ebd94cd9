"""The checkpoints of the parity tests."""

from __future__ import annotations

from tests.parity.conftest import builder  # noqa: F401 (a fixture)
