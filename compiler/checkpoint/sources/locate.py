"""Finds what the user named: a local directory or .gguf file, or a model of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")  # the first that is there is downloaded
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


def locate(name: str | Path) -> Path:
    """The local path of a checkpoint; a Hub name is downloaded, to the Hub's cache, only if no such path exists."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if HUB_NAME.fullmatch(str(name)):
        return _download(str(name))
    raise CompileError(
        STAGE,
        f"path {path}",
        found="nothing there",
        expected="a checkpoint directory, a .gguf file or a Hub name",
        remedy="check the path",
    )


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = [entry.rfilename for entry in HfApi().model_info(name).siblings or []]
        suffix = next((suffix for suffix in WEIGHT_SUFFIXES if any(file.endswith(suffix) for file in files)), "")
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, f"*{suffix}" if suffix else "*.index.json"]))
    except RepositoryNotFoundError as e:
        raise CompileError(
            STAGE,
            f"checkpoint {name}",
            found="neither a local path nor a model on the Hugging Face Hub",
            expected="one of them",
            remedy="check the spelling, or log in with `hf auth login` if it is private",
        ) from e
    except Exception as e:  # the client's HTTP library, and so its errors, differ between versions
        try:  # what an earlier download left in the cache
            return Path(snapshot_download(name, local_files_only=True))
        except OSError:
            raise CompileError(
                STAGE,
                f"checkpoint {name}",
                expected="a local checkpoint or a network",
                found=f"no such local path, and the Hugging Face Hub cannot be reached ({type(e).__name__})",
                remedy="download it where there is a network, and give its directory",
            ) from e


def single_gguf(path: Path) -> Path | None:
    """The GGUF file to open for this path, or None if it is a Hugging Face directory."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise CompileError(
            STAGE,
            f"path {path}",
            found="a file",
            expected="a checkpoint directory or a .gguf file",
            remedy=f"give the directory that holds it: {path.parent}",
        )
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    if len(files) > 1:
        raise CompileError(
            STAGE,
            f"directory {path}",
            found=f"{len(files)} GGUF files",
            expected="one",
            remedy=f"give the path of one of them, such as {files[0]}",
        )
    return files[0]
