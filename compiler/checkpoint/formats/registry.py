"""The list of all formats, and the choice of the one that reads a checkpoint's files."""

from __future__ import annotations

from pathlib import Path

from belle_compile.compiler.checkpoint.formats.base import Contents, Format
from belle_compile.compiler.checkpoint.formats.gguf import Gguf
from belle_compile.compiler.checkpoint.formats.huggingface import require_config
from belle_compile.compiler.checkpoint.formats.pickles import Pickles
from belle_compile.compiler.checkpoint.formats.safetensors import Safetensors
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError

# The first format that recognises the files reads them; a note names others that recognise them too.
FORMATS: tuple[Format, ...] = (
    Safetensors(),
    Pickles(),
    Gguf(),
)
_HUGGING_FACE = "model.safetensors or pytorch_model.bin, single or sharded"
# Files in releases of these families that cannot be read: pattern, description and remedy.
NOT_YET = (
    ("adapter_model.*", "a LoRA adapter", "merge it into its base model (PEFT's merge_and_unload) and give the result"),
    ("*.enc", "an XOR-encrypted release", "decrypt it first with models/decrypt.py of the BELLE repository"),
    ("*.pt", "a GPTQ .pt file", "quantised GPTQ checkpoints are not yet supported: give the checkpoint it was made from"),
    ("*.pth", "original LLaMA weights", "convert them with Transformers' convert_llama_weights_to_hf.py"),
)


def weight_patterns() -> list[str]:
    """Glob patterns of the files that hold weights, those of the preferred format first."""
    return [format.weights for format in FORMATS]


def read_contents(files: Files) -> Contents:
    """Read the files with the first format that recognises them; raises CompileError if none does."""
    recognised = [format for format in FORMATS if format.recognises(files)]
    if not recognised:
        raise _unrecognised(files)
    chosen, *others = recognised
    contents = chosen.read(files)
    contents.notes += [f"{other.name} weights are there too and were not used: {chosen.name} is preferred" for other in others]
    return contents


def _unrecognised(files: Files) -> CompileError:
    if files.directory is None:
        return CompileError(
            STAGE,
            f"path {files.path}",
            found="a file",
            expected="a checkpoint directory or a .gguf file",
            remedy=f"give the directory that holds it: {files.path.parent}",
        )
    require_config(files.directory)
    for pattern, kind, remedy in NOT_YET:
        if matching := files.matching(pattern):
            return _no_weights(files.directory, f"only {matching[0].name}, {kind}", _HUGGING_FACE, remedy)
    names = sorted(file.name for file in files.directory.iterdir())
    return _no_weights(
        files.directory,
        "only " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
        f"{_HUGGING_FACE}, or one .gguf file",
        "download the weight files into this directory",
    )


def _no_weights(directory: Path, found: str, expected: str, remedy: str) -> CompileError:
    return CompileError(STAGE, f"weights in {directory}", found=found, expected=expected, remedy=remedy)
