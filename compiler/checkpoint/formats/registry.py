"""The list of all formats, and the choice of the one that reads a checkpoint's files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from belle_compile.compiler.checkpoint.formats.base import TRAINER_FILES, Contents, Format
from belle_compile.compiler.checkpoint.formats.gguf import Gguf
from belle_compile.compiler.checkpoint.formats.gptq_file import GptqFile
from belle_compile.compiler.checkpoint.formats.huggingface import CONFIG, require_config
from belle_compile.compiler.checkpoint.formats.original_llama import PARAMS, OriginalLlama
from belle_compile.compiler.checkpoint.formats.pickles import PICKLES
from belle_compile.compiler.checkpoint.formats.safetensors import SAFETENSORS
from belle_compile.compiler.checkpoint.formats.shards import Indexed, Numbered, Release, Single, Stated
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.sources.encrypted import KEY
from belle_compile.compiler.checkpoint.sources.encrypted import PATTERN as ENCRYPTED
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath, by_name

# The first format that recognises the files reads them; a note names the weights that it passes over.
FORMATS: tuple[Format, ...] = (
    # The order of Transformers (`_get_resolved_checkpoint_files` in modeling_utils.py). An index outlives its shards where a
    # model was saved again in one file.
    Release(SAFETENSORS, Stated()),
    Release(SAFETENSORS, Single()),
    Release(SAFETENSORS, Indexed()),
    Release(PICKLES, Single()),
    Release(PICKLES, Indexed()),
    # What Transformers does not load without being told to.
    Release(SAFETENSORS, Numbered()),
    Release(PICKLES, Numbered()),
    OriginalLlama(),
    Gguf(),
    GptqFile(),
)
_HUGGING_FACE = "model.safetensors or pytorch_model.bin, single or sharded"
# Files in releases of these families that cannot be read: pattern, description and remedy.
NOT_YET = (
    ("adapter_model.*", "a LoRA adapter", "give its base model, and this directory with --adapter"),
    (ENCRYPTED, "a file of an XOR-encrypted release", f"give its key with --key: {KEY}"),
    ("*.pth", "original LLaMA weights", f"put {PARAMS} and every part, consolidated.00.pth and so on, beside it"),
)
_WITHOUT_CONFIG = (ENCRYPTED, "*.pth")  # they are no weights beside a config.json
# The file by which PEFT knows an adapter. Beside a config.json, Transformers loads the model and the adapter on top of it.
_ADAPTER = "adapter_config.json"
# Shards of a distributed checkpoint, which Transformers prefers to every other weights.
_DISTRIBUTED = "shard-[0-9][0-9][0-9][0-9][0-9]-model-*-of-*.safetensors"
# Files that look like weights: those of every framework.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pt", "*.pth", "*.h5",
                 "*.msgpack")  # fmt: skip
_NAMED = 4  # files that a note names


def weight_patterns() -> list[tuple[str, ...]]:
    """The glob patterns of the files that hold weights, those of the preferred format first; see `Format.weights`."""
    return [*(format.weights for format in FORMATS), (ENCRYPTED,)]


def read_contents(files: Files) -> Contents:
    """Read the files with the first format that recognises them; raises CompileError if none does."""
    if files.directory is not None and (shards := files.matching(_DISTRIBUTED)):
        raise _no_weights(
            files.directory,
            f"{shards[0].name}, a shard of a distributed checkpoint",
            _HUGGING_FACE,
            "load it with Transformers and save it with save_pretrained",
        )
    chosen = next((format for format in FORMATS if format.recognises(files)), None)
    if chosen is None:
        raise _unrecognised(files)
    contents = chosen.read(files)
    contents.notes += _passed_over(files, contents)
    return contents


def adapter_notes(files: Files, ignored: bool | None, merged: Collection[StoredPath] = ()) -> list[str]:
    """A note on an adapter beside a model's weights that was passed over, if the user asked for that (`ignored`); nothing is
    looked for where that is None.

    Raises CompileError for an adapter otherwise, unless it is in one of the directories that are `merged`: with PEFT installed,
    Transformers would load another model, the one with the adapter. Weights of an adapter without its config are files like any
    other, for Transformers too.
    """
    if ignored is None or (not ignored and any(Path(str(directory)).samefile(str(files.path)) for directory in merged)):
        return []
    there = [file for name in (_ADAPTER, CONFIG) for file in files.matching(name)] if files.directory is not None else []
    if len(there) < 2:
        if ignored:
            found = f"no {_ADAPTER} beside the weights"
            raise CompileError(STAGE, "--ignore-adapter", found=found, remedy="leave the option out")
        return []
    if ignored:
        return [f"the adapter of {_ADAPTER} was passed over because --ignore-adapter asked for it: the model is its base"]
    raise CompileError(
        STAGE,
        f"weights in {files.path}",
        found=f"a model and, by {_ADAPTER}, a LoRA adapter that Transformers loads on top of it",
        expected="one of them",
        remedy=f"pass --adapter {files.path} to merge the adapter, or --ignore-adapter for the base model",
    )


def _passed_over(files: Files, contents: Contents) -> list[str]:
    """A note on the weights in the directory that were not read; none if all were."""
    patterns = dict.fromkeys([*_WEIGHT_FILES, *(pattern for format in FORMATS for pattern in format.weights)])
    there = {file for pattern in patterns for file in files.matching(pattern)}
    ignored = {file for pattern in TRAINER_FILES for file in files.matching(pattern)}
    rest = by_name(there - ignored - set(contents.files))
    if not rest:
        return []
    read = next((file for file in contents.files if file in there), files.path)
    names = ", ".join(_described(file) for file in rest[:_NAMED])
    more = f" and {len(rest) - _NAMED} more" if len(rest) > _NAMED else ""
    return [f"the weights are those of {read.name}; passed over: {names}{more}"]


def _described(file: StoredPath) -> str:
    kind = next((kind for pattern, kind, _ in NOT_YET if file.match(pattern)), "")
    return f"{file.name} ({kind})" if kind else file.name


def _unrecognised(files: Files) -> CompileError:
    if files.directory is None:
        return CompileError(
            STAGE,
            f"path {files.path}",
            found="a file",
            expected="a checkpoint directory, a .gguf file or a .pt file of GPTQ",
            remedy=f"give the directory that holds it: {files.path.parent}",
        )
    _refuse_adapter(files.directory)
    for pattern, kind, remedy in NOT_YET:
        if pattern in _WITHOUT_CONFIG or files.matching(CONFIG):
            if matching := files.matching(pattern):
                return _no_weights(files.directory, f"only {matching[0].name}, {kind}", _HUGGING_FACE, remedy)
    require_config(files.directory)
    names = sorted(file.name for file in files.directory.iterdir())
    return _no_weights(
        files.directory,
        "only " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
        f"{_HUGGING_FACE}, or one .gguf or .pt file",
        "download the weight files into this directory",
    )


def _refuse_adapter(directory: StoredPath) -> None:
    """Raise CompileError for a directory with an adapter and no model."""
    if not (file := directory / _ADAPTER).is_file() or (directory / CONFIG).is_file():
        return
    stated = read_json(file).get("base_model_name_or_path")
    base = stated if isinstance(stated, str) and stated.isprintable() and stated else "BASE"
    raise CompileError(
        STAGE,
        f"directory {directory}",
        found="a LoRA adapter without the model that it changes",
        expected="a model",
        remedy=f"belle-compile build {base} --adapter {directory}",
    )


def _no_weights(directory: StoredPath, found: str, expected: str, remedy: str) -> CompileError:
    return CompileError(STAGE, f"weights in {directory}", found=found, expected=expected, remedy=remedy)
