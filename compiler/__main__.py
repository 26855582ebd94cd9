"""`python -m belle_compile.compiler` is `belle-compile`."""

from belle_compile.compiler.cli import main

if __name__ == "__main__":
    main()
