"""The options of each command."""

from __future__ import annotations

import click

from belle_compile.compiler import cli

REPORTING = {"-v", "--verbose", "-q", "--quiet", "--log"}
READING = {
    "--adapter", "--adapter-scale", "--ignore-config-key", "--ignore-adapter", "--key", "--save-decrypted",
}  # fmt: skip
LIBRARY = {"--library", "--version-compatible", "--timing-cache"}
OPTIONS = {
    "build": {
        "--target", "-o", "--output", "--quant", "--methods", "--kv-cache", "--backend", "--isa", "--template", "--dump-ir",
        "--no-calibration", "--calibration", "--raw-requests", "--size-budget", "--weight-budget", "--max-ppl-ratio",
        "--min-top1", "--min-accuracy-kept", "--no-gate", "--tune", "--fuse", "--drift", "--force", "--generation-defaults",
        "--lora-rank", "--lora-targets", *LIBRARY, *READING, *REPORTING,
    },
    "edit": {"--generation-defaults"},
    "calibrate-set": {
        "-o", "--output", "--size", "--holdout", "--seed", "--field", "--answer", "--label", "--redact", "--tokenizer",
        "--similarity", "--max-length", "--force", *READING, *REPORTING,
    },
    "export": {
        "--format", "-o", "--output", "--quant", "--methods", "--template", "--calibration", "--raw-requests",
        "--max-ppl-ratio", "--min-top1", "--min-accuracy-kept", "--no-gate", "--force", "--dtype",
        "--generation-defaults", *READING, "--keep-tied", "--granularity", "--runtime-python", *REPORTING,
    },
    "inspect": {"--kernels"},
    "plan": {"--target", "--quant", "--methods", "--kv-cache", "--backend", "--batch", "--context", "--measured", *READING},
    "repartition": {"--target", "--backend", *LIBRARY, "-o", "--output", "--force", *REPORTING},
    "sensitivity": {
        "--calibration", "--raw-requests", "--template", "--quant", "--tokens", "--output-errors", "-o", "--output",
        *READING, *REPORTING,
    },
    "targets": {"--backends"},
    "verify": REPORTING,
}  # fmt: skip


def test_options_are_these_and_no_more() -> None:
    for name, command in cli.cli.commands.items():
        options = {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
        assert options == OPTIONS.get(name, set()) | {"--json", "--config", "--version"}
