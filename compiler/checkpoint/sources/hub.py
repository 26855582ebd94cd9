"""Models of the Hugging Face Hub, downloaded to the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


class Hub:
    """A model on the Hub, given by its owner and name, such as BelleGroup/BELLE-7B-2M."""

    def recognises(self, name: str) -> bool:
        return NAME.fullmatch(name) is not None

    def fetch(self, name: str, weights: Sequence[Sequence[str]]) -> Files:
        """Download the weights of one format and all small files. Without a network, use the files of an earlier download."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            files = [entry.rfilename for entry in HfApi().model_info(name).siblings or []]
            there = [patterns for patterns in weights if patterns and any(fnmatchcase(file, patterns[0]) for file in files)]
            return Files(Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *(there[0] if there else ())])))
        except RepositoryNotFoundError as e:
            raise CompileError(
                STAGE,
                f"checkpoint {name}",
                found="neither a local path nor a model on the Hugging Face Hub",
                expected="one of them",
                remedy="check the spelling, or log in with `hf auth login` if it is private",
            ) from e
        except Exception as e:  # the client's HTTP library, and so its errors, differ between versions
            try:
                return Files(Path(snapshot_download(name, local_files_only=True)))
            except OSError:
                raise CompileError(
                    STAGE,
                    f"checkpoint {name}",
                    expected="a local checkpoint or a network",
                    found=f"no such local path, and the Hugging Face Hub cannot be reached ({type(e).__name__})",
                    remedy="download it where there is a network, and give its directory",
                ) from e
