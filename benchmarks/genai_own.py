"""ONNX Runtime GenAI's own int8 models: by its model builder, or by the quantizer of that for architectures it does not know.

The builder rounds the weights of linears and of the head to 8 bits with a scale for each 32 inputs, activations likewise while
running; the embedding stays float32. It does not know BLOOM: there, its quantizer gets the float32 model that
`belle-compile export --format onnx --quant none` writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from belle_compile.compiler.exports import driver
from belle_compile.compiler.exports.request import ExportRequest

BLOCK, INT8_ACTIVATIONS = 32, 4  # the builder's `block_size` and `accuracy_level`
_FIND = "import importlib.util as u; print(u.find_spec('onnxruntime_genai').submodule_search_locations[0])"


def own_int8(source: Path, out: Path, python: Path) -> Path:
    """Write GenAI's int8 model of a float32 checkpoint in Transformers' format into the new folder `out`; `python` is the
    interpreter that GenAI is installed for. The builder itself runs here, because it needs torch and Transformers."""
    architecture = json.loads((source / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    found = subprocess.run([str(python), "-c", _FIND], check=True, capture_output=True, text=True)
    builder = Path(found.stdout.strip()) / "models" / "builder.py"
    if f'"{architecture}"' not in builder.read_text(encoding="utf-8"):
        return _quantized(source, out)
    cache = out.with_name(out.name + ".cache")
    command = [sys.executable, str(builder), "-i", str(source), "-o", str(out), "-p", "int8", "-e", "cpu", "-c", str(cache)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    shutil.rmtree(cache, ignore_errors=True)
    return out


def _quantized(source: Path, out: Path) -> Path:
    """The float32 export of a checkpoint, quantized as the builder quantizes its own graphs."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    plain = out.with_name(out.name + ".float32")
    driver.export(ExportRequest(source, plain, "onnx", quantization="none", force=True))
    quantizer = MatMulNBitsQuantizer(
        onnx.load(plain / "model.onnx"), bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
    )
    quantizer.process()
    out.mkdir()
    quantizer.model.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(plain / name, out)
    shutil.rmtree(plain)
    return out
