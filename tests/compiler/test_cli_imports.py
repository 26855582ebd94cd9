"""A command line that is wrong fails before anything is imported that takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.checkouts import ROOT
from tests.compiler.engines import write_engine

# Changes of generation defaults that are wrong: a key, values, a file that is missing, and files with something else.
CHANGES = ("temprature=0", "top_k=1.5", "top_p=2", "missing.json", "list.json", "wrong.json", "text.json", "checkpoint")
# Commands that are wrong, each with the status; a checkpoint is there as `checkpoint`, an engine as `engine`.
WRONG = [
    (["build", "missing", "-o", "new"], 1),
    (["build", "engine", "-o", "new"], 1),
    (["build", "checkpoint", "-o", "engine"], 1),
    (["build", "checkpoint", "-o", "new", "--target", "tpu"], 1),
    (["build", "checkpoint", "-o", "new", "--methods", "round"], 1),
    (["build", "checkpoint", "-o", "new", "--isa", "mmx"], 1),
    (["build", "checkpoint", "-o", "new", "--backend", "tpu"], 2),
    (["build", "checkpoint", "-o", "new", "--calibration", "missing"], 1),
    (["build", "checkpoint", "-o", "new", "--template", "missing.jinja"], 1),
    (["build", "checkpoint", "-o", "new", "--size-budget", "1.2"], 1),
    *((["build", "checkpoint", "-o", "new", "--generation-defaults", change], 1) for change in CHANGES),
    *((["edit", "engine", "--generation-defaults", change], 1) for change in CHANGES),
    (["build", "checkpoint", "-o", "new", "--min-top1", "2"], 2),
    (["build", "checkpoint"], 2),
    (["repartition", "missing", "-o", "new", "--target", "cpu"], 1),
    (["repartition", "engine", "-o", "new", "--target", "tpu"], 1),
    (["sensitivity", "checkpoint", "--calibration", "missing"], 1),
    (["plan", "missing"], 1),
    (["calibrate-set", "missing", "-o", "new"], 1),
    (["inspect", "missing"], 1),
    (["verify", "missing"], 1),
    (["edit", "missing", "--generation-defaults", "top_k=1"], 1),
    (["bild"], 2),
]  # fmt: skip
# What takes seconds to import; measuring the seconds would depend on the host.
HEAVY = ("torch", "onnx", "onnx_ir", "tvm", "tvm_ffi", "triton", "transformers", "huggingface_hub", "rich", "safetensors")
EACH = """
    import contextlib, io, json, os, sys
    from belle_compile.compiler import cli
    for arguments in json.loads(sys.argv[1]):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                cli.main(arguments)
            except SystemExit as end:
                status = end.code
        loaded = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
        print(json.dumps([arguments, status, errors.getvalue(), loaded]))
"""


def test_a_wrong_command_line_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wrong.json").write_text('{"do_sample": true, "temperature": "hot"}')
    (tmp_path / "text.json").write_text("top_k: 1")
    command = [sys.executable, "-c", textwrap.dedent(EACH), json.dumps([each for each, _ in WRONG]), json.dumps(HEAVY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome[:2] for outcome in outcomes] == [[arguments, status] for arguments, status in WRONG]
    for arguments, _, message, loaded in outcomes:
        assert loaded == [], f"{arguments} imports {loaded}"
        assert message.startswith("belle-compile: ") and message.count("\n") == 1, message
