"""Engines as models of EleutherAI's lm-evaluation-harness: the class, the command, and a comparison with float32."""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).parents[1] / "lm_eval_tasks"
