"""Graphs of the tiny models as the TensorRT backend gets them, and their ONNX models run step by step by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from belle_compile.compiler import backends
from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.tensorrt.build import write_model
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.passes.base import Phase
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import recipe_of
from tests.parity.variants import VARIANTS, random_ids

Floats = npt.NDArray[np.float32]
RECIPES = {"none": None, "int8": ("rotate", "rotate-online", "static"), "int8-accurate": ("rotate",)}


def graph(name: str, preset: str, folder: Path) -> tuple[Path, ir.Model]:
    """The checkpoint of a variant, and its graph after the passes of a preset that the backend carries."""
    checkpoint = VARIANTS[name](folder / name)
    sequences = tuple(tuple(random_ids(checkpoint, 40, seed)) for seed in range(4))
    data = CalibrationData(sequences, "requests", name, folder)
    recipe = recipe_of(preset, RECIPES[preset], calibrated=True)
    carried = backends.get("tensorrt").passes(recipe)
    passes = passes_of(recipe, data)
    model = build_graph(open_checkpoint(checkpoint))
    run_pipeline(model, [step for step in passes if step.phase is not Phase.FUSION or carried.carries_fusion(step.name)])
    return checkpoint, model


class Runner:
    """One sequence, computed by ONNX Runtime."""

    def __init__(self, model: OnnxModel, folder: Path) -> None:
        write_model(model, folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        # Beyond the basic level, ONNX Runtime rounds activations itself where only weights are quantized.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        caches = (tensor for tensor in self._session.get_inputs() if tensor.name.startswith("past_key_values"))
        self.cache: dict[str, Any] = {tensor.name: np.ones((1, *tensor.shape[1:]), dtypes[tensor.type]) for tensor in caches}
        self.length = 0

    def step(self, ids: Sequence[int], filled: int = 0) -> Floats:
        """The logits [tokens, vocabulary] of the next tokens, in a run that is filled up with tokens which do not count."""
        inputs = {
            "input_ids": np.array([[*ids, *[7] * filled]], np.int32),
            "first_positions": np.array([self.length], np.int64),
            "logit_rows": np.arange(len(ids), dtype=np.int32),
            "rope_lengths": np.array([self.length + len(ids)], np.int32),
        }
        names = {tensor.name for tensor in self._session.get_inputs()}
        given = {name: value for name, value in inputs.items() if name in names} | self.cache
        results = self._session.run(None, given)
        outputs = dict(zip((tensor.name for tensor in self._session.get_outputs()), results, strict=True))
        self.cache = {name: outputs[name.replace("past_key_values", "present")] for name in self.cache}
        self.length += len(ids)
        logits: Floats = outputs["logits"]
        return logits


def stepped(model: OnnxModel, folder: Path, ids: Sequence[int]) -> Floats:
    """The logits of all tokens: of 17, of one, and of the others."""
    runner = Runner(model, folder)
    return np.concatenate([runner.step(ids[:17], filled=3), runner.step(ids[17:18]), runner.step(ids[18:], filled=1)])
