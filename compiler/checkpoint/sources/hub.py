"""Models of the Hugging Face Hub, downloaded to the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.places import MODEL_SUFFIXES, hub_name

_PART = re.compile(r"-\d{5}-of-(?P<count>\d{5})\.gguf$")
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_NAMED = 20  # files that an error names


class Hub:
    """A model on the Hub, given by its owner and name, such as BelleGroup/BELLE-7B-2M, or one of its .gguf or .pt files."""

    def recognises(self, name: str) -> bool:
        return hub_name(name) is not None

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        """Download the weights of one format and all small files. Without a network, use the files of an earlier download."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError

        match = hub_name(name)
        assert match is not None, f"{name} is no name of the Hub"
        model, file = match["model"], match["file"]
        try:
            files = [entry.rfilename for entry in HfApi().model_info(model).siblings or []]
        except RepositoryNotFoundError as e:
            raise CompileError(
                STAGE,
                f"checkpoint {name}",
                found="neither a local path nor a model on the Hugging Face Hub",
                expected="one of them",
                remedy="check the spelling, or log in with `hf auth login` if it is private",
            ) from e
        except Exception as e:  # the client's HTTP library, and so its errors, differ between versions
            return _below(_cached(name, model, e), file)
        patterns = _file_patterns(name, file, files) if file else _patterns(name, files, weights)
        try:
            return _below(Path(snapshot_download(model, allow_patterns=patterns)), file)
        except Exception as e:
            return _below(_cached(name, model, e), file)


def _patterns(name: str, files: Sequence[str], weights: Sequence[Sequence[str]]) -> list[str]:
    """Patterns of the small files and of the weights of the preferred format; raises CompileError for several models in files
    of their own (GGUF, GPTQ's .pt)."""
    there = next((each for each in weights if each and any(fnmatchcase(file, each[0]) for file in files)), ())
    singles = [file for file in files if file.endswith(MODEL_SUFFIXES) and (not there or fnmatchcase(file, there[0]))]
    models = {_PART.sub(".gguf", file) for file in singles}
    if len(models) > 1:
        first = [file for file in sorted(singles) if not _PART.search(file) or "-00001-of-" in file]
        raise CompileError(
            STAGE,
            f"checkpoint {name}",
            found=f"{len(models)} models: {', '.join(first[:_NAMED])}" + (", ..." if len(first) > _NAMED else ""),
            expected="one of them",
            remedy=f"give its file too, such as {name}/{first[0]}",
        )
    return [*SMALL_FILES, *there]


def _file_patterns(name: str, file: str, files: Sequence[str]) -> list[str]:
    """The pattern of a file, or of all parts of its model; raises CompileError if the repository does not have it."""
    if file not in files:
        others = [other for other in files if other.endswith(MODEL_SUFFIXES)]
        raise CompileError(
            STAGE,
            f"checkpoint {name}",
            found=f"no {file} in the repository",
            expected=f"one of {', '.join(others[:_NAMED])}"
            if others
            else f"a repository with {' or '.join(MODEL_SUFFIXES)} files",
            remedy="check the spelling",
        )
    small = [] if file.endswith(".gguf") else SMALL_FILES  # a GGUF file holds config and tokenizer
    return [*small, _PART.sub(r"-*-of-\g<count>.gguf", file)]


def _cached(name: str, model: str, error: Exception) -> Path:
    """The directory of an earlier download; raises CompileError, which names the type of `error`, if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except OSError:
        raise CompileError(
            STAGE,
            f"checkpoint {name}",
            expected="a local checkpoint or a network",
            found=f"no such local path, and the Hugging Face Hub cannot be reached ({type(error).__name__})",
            remedy="download it where there is a network, and give its directory",
        ) from error


def _below(directory: Path, file: str | None) -> Files:
    return Files(directory / file if file else directory)
