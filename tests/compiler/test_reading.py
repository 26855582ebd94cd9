"""The record that says how a checkpoint is read: its options and facts, and that it needs no large package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from belle_compile.compiler.reading import PLAIN, AdapterChoice, Reading


def test_options_and_facts_are_those_that_were_given() -> None:
    assert (PLAIN.options, PLAIN.facts) == ([], {})
    adapters = (AdapterChoice("/models/lora/chat/"), AdapterChoice("group/style", 0.5))
    reading = Reading(("qk_scale", "gates"), ignore_adapter=True, adapters=adapters)
    assert reading.options == ["--ignore-config-key", "--ignore-adapter", "--adapter"]
    assert reading.facts == {
        "ignored_config_keys": ["qk_scale", "gates"],
        "ignored_adapter": True,
        "adapters": ["chat", "style at 0.5"],
    }


def test_a_key_is_recorded_by_its_name() -> None:
    reading = Reading(key=Path("models/consolidated.00.pth"), save_decrypted=Path("plain"))
    assert reading.options == ["--key", "--save-decrypted"] and reading.facts == {"decrypted_with": "consolidated.00.pth"}


def test_requests_with_it_need_no_package_of_builds() -> None:
    code = """
import sys
from belle_compile.compiler.build_request import BuildRequest
from belle_compile.compiler.exports.request import ExportRequest
assert BuildRequest("a", "b").reading == ExportRequest("a", "b", "gguf").reading
print(sorted({"torch", "transformers", "onnx_ir", "tvm", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
