"""Runs a translated model under ONNX Runtime, a sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.onnx.interface import ServingInterface
from belle_compile.compiler.backends.onnx.translate import translate
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.runtime.program import WEIGHTS_NAME

Floats = npt.NDArray[np.float32]
CAPACITY = 96  # positions of the cache


def save(model: OnnxModel, folder: Path) -> Path:
    """Write a model and its weights; returns the path of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.content)
    data = b"".join(tensor.pack().tobytes() for tensor in model.weights)
    (folder / WEIGHTS_NAME).write_bytes(weights_header(model.weights) + data)
    return folder / "model.onnx"


class Session:
    """A model with the cache of one sequence."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_outputs()]
        self.cache = {
            entry.name: np.zeros((1, entry.shape[1], CAPACITY, entry.shape[3]), np.float32)
            for entry in self.session.get_inputs()
            if entry.name.startswith("past_key_values")
        }

    def run(self, inputs: dict[str, npt.NDArray[Any]]) -> Floats:
        """The logits of a step; the cache is copied, not updated in place."""
        outputs = dict(zip(self.names, self.session.run(None, inputs | self.cache), strict=True))
        for name in self.cache:
            self.cache[name] = outputs[name.replace("past_key_values", "present")]
        logits: Floats = outputs["logits"]
        return logits


def run(source: ir.Model, folder: Path, steps: Sequence[Sequence[int]]) -> Floats:
    """The logits [tokens, vocabulary] of a graph's translation for one sequence, whose tokens come in steps."""
    session, logits, done = Session(save(translate(source, ServingInterface()), folder)), [], 0
    names = {entry.name for entry in session.session.get_inputs()}
    for tokens in steps:
        done += len(tokens)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.asarray([tokens], np.int32),
            "last_positions": np.array([done - 1], np.int32),
            "total_length": np.array(done, np.int32),
            "logit_rows": np.arange(len(tokens), dtype=np.int32),
            "rope_lengths": np.array([done], np.int32),
        }
        logits.append(session.run({name: array for name, array in inputs.items() if name in names}))
    return np.concatenate(logits)
