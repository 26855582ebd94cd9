"""`python -m compiler`: the same as `belle-compile`."""

from compiler.cli import main

if __name__ == "__main__":
    main()
