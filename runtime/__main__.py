"""python -m belle_compile.runtime is belle-run."""

from belle_compile.runtime.cli import main

main(prog_name="belle-run")
