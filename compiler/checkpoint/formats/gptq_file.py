"""BELLE's GPTQ releases: a `.pt` file, such as bloom7b-2m-8bit-128g.pt, beside config.json and the tokenizer."""

from __future__ import annotations

from belle_compile.compiler.checkpoint.formats.base import TRAINER_FILES, Contents
from belle_compile.compiler.checkpoint.formats.huggingface import Weights, read_release
from belle_compile.compiler.checkpoint.formats.pickles import PICKLES
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.stored_path import StoredPath

_NAMED = 12  # files that an error names


class GptqFile:
    """A `.pt` file: the only one of a directory, or one of several that is named itself."""

    weights = ("*.pt",)

    def recognises(self, files: Files) -> bool:
        return bool(self._found(files))

    def read(self, files: Files) -> Contents:
        file, *others = self._found(files)
        if others:
            names = ", ".join(other.name for other in (file, *others[: _NAMED - 1]))
            raise CompileError(
                STAGE,
                f"directory {files.path}",
                found=f"{1 + len(others)} .pt files: {names}" + (", ..." if len(others) >= _NAMED else ""),
                expected="one",
                remedy=f"give the path of one of them, such as {file}",
            )
        return read_release(file.parent, lambda _: Weights(PICKLES.opener()(file), [file], PICKLES.notes([file]), packed=True))

    def _found(self, files: Files) -> list[StoredPath]:
        of_trainers = {file for pattern in TRAINER_FILES for file in files.matching(pattern)}
        return [file for pattern in self.weights for file in files.matching(pattern) if file not in of_trainers]
