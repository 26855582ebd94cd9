"""python -m runtime is belle-run."""

from runtime.cli import main

main(prog_name="belle-run")
