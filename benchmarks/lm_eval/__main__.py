"""Scores an engine with EleutherAI's lm-evaluation-harness.

    python -m benchmarks.lm_eval artifacts/belle-7b-cpu --tasks python_docs
    python -m benchmarks.lm_eval artifacts/belle-7b-cpu --tasks hellaswag,arc_easy --num_fewshot 5 --output_path results
    python -m benchmarks.lm_eval artifacts/belle-7b-cpu --tasks my_task --include_path my_tasks --apply_chat_template
    python -m benchmarks.lm_eval artifacts/belle-7b-cpu --tasks python_docs --model_args threads=8,max_length=1024

All that follows ENGINE are options of `lm_eval run` (shown by `python -m benchmarks.lm_eval ENGINE --help`); what --model_args
takes stands in benchmarks/lm_eval/model.py. Without --include_path the tasks of benchmarks/lm_eval_tasks are known beside the
harness' own. Needs the extra `eval`. A run that fails says why in one sentence and exits with 1; BELLE_TRACEBACK=1 shows where.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.errors import BelleError
from benchmarks.lm_eval import TASKS


def run(arguments: Sequence[str] | None) -> None:
    """The harness' own command with the engine as its model; raises whatever goes wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lm_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of lm_eval run; --tasks at least")
    given = parser.parse_args(arguments)
    if not given.options:
        parser.error("say after ENGINE what to run, as in --tasks python_docs")
    read_manifest(Path(given.engine))  # before anything slow

    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import benchmarks.lm_eval.model  # noqa: F401  (registers `belle`)

    setup_logging()
    sys.argv = ["lm_eval", "run", *given.options]  # its parser reads no other arguments
    harness = HarnessCLI()
    options = harness.parse_args()
    if options.model not in (None, "belle"):
        parser.error(f"--model {options.model}: the model is ENGINE")
    options.model = "belle"
    options.model_args = {"engine": given.engine} | (options.model_args or {})
    options.device = "cpu"
    options.include_path = options.include_path or str(TASKS)
    harness.execute(options)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0, 1 with one sentence on stderr, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        run(arguments)
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted.", 130)
    except Exception as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        _fail(_sentence(error), 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, BelleError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is not installed; run `pip install -c constraints.txt -e '.[eval]'`."
    if isinstance(error, ValueError):  # what the harness says of tasks it does not know and options that do not fit
        return f"lm_eval: {str(error).rstrip('.')}."
    return f"lm_eval: {type(error).__name__}: {error}; run again with BELLE_TRACEBACK=1 to see where."


def _fail(sentence: str, status: int) -> NoReturn:
    print(" ".join(sentence.split()), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
