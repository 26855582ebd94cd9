"""Loads an engine together with another one that guesses ahead for it, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from belle_compile import __version__
from belle_compile.runtime.artifact import Manifest, read_manifest, verify_files
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor, LoadRequest, executor_of
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.loading import Options, load_parts
from belle_compile.runtime.serving.draft_lengths import DraftLengths
from belle_compile.runtime.serving.draft_model import DraftModel
from belle_compile.runtime.serving.request import EngineIdentity
from belle_compile.runtime.tokenizer import Tokenizer

STAGE = "draft"
_TOKENIZER = "tokenizer.json"
_CACHE_SHARE = 0.5  # of the memory free beside the draft's weights that its cache gets, times its part of what both require


@dataclass(frozen=True)
class Draft:
    """The engine that guesses ahead: its directory, and how many tokens it guesses; None for as many as pay."""

    directory: Path
    tokens: int | None = None

    @classmethod
    def of(cls, directory: str | Path | None, tokens: int | None) -> Draft | None:
        """Read the arguments of `Engine.load`; raises `EngineError` for what is no path."""
        if directory is None:
            if tokens is not None:
                raise EngineError(STAGE, "draft_tokens", found="no draft", expected="draft too, the engine that guesses them")
            return None
        if not isinstance(directory, (str, Path)):
            raise EngineError(STAGE, "draft", found=type(directory).__name__, expected="a path")
        return cls(Path(directory), tokens)

    def __post_init__(self) -> None:
        """Raise `EngineError` for a number that is none."""
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            found = f"{str(self.tokens)[:80]} ({type(self.tokens).__name__})"
            raise EngineError(STAGE, "draft_tokens", found=found, expected="a whole number, 1 or more")


def load_both(
    directory: Path, options: Options, draft: Draft | None, prefix_cache: bool
) -> tuple[Manifest, Tokenizer, Executor, DraftModel | None]:
    """Check and load an engine, and the draft engine if there is one, which is checked first; raises `EngineError`."""
    if draft is None:
        return *load_parts(directory, options), None
    if ranks.place() is not None:
        raise _several_ranks("several processes")
    drafts = _load_draft(directory, options, draft, prefix_cache)
    try:
        manifest, tokenizer, executor = load_parts(directory, options, beside=drafts.executor)
    except BaseException:
        drafts.close()
        raise
    try:
        _check_fit(executor, drafts.executor)
    except BaseException:
        drafts.close()
        executor.close()
        raise
    return manifest, tokenizer, executor, drafts


def _load_draft(directory: Path, options: Options, draft: Draft, prefix_cache: bool) -> DraftModel:
    model = read_manifest(directory)
    if model.target.ranks > 1:
        raise _several_ranks(f"an engine of {model.target.ranks} ranks")
    try:
        manifest = read_manifest(draft.directory)
        if manifest.digest == model.digest:
            remedy = "give a smaller engine of the same vocabulary, such as one of --quant int4"
            raise EngineError(STAGE, "the draft is the engine itself", found=str(draft.directory), remedy=remedy)
        if manifest.target.ranks > 1:
            found = f"a draft of {manifest.target.ranks} ranks"
            raise EngineError(STAGE, "ranks", found=found, expected="one rank", remedy="rebuild the draft for one rank")
        factory, target = executor_of(manifest), manifest.target
        executor_of(model).check_host(model.target)
        factory.check_host(target, held_bytes=model.target.requires.memory_bytes)
        verify_files(draft.directory, manifest, full=options.full, progress=options.progress, rank=0)
        _check_vocabulary(directory, model, draft.directory, manifest)
        isa = options.isa if target.backend == model.target.backend else None
        memory = _cache_memory(options, manifest, model)
        executor = factory.load(LoadRequest(draft.directory / "rank0", manifest, options.threads, isa, memory))
    except EngineError as error:
        parts = {name: getattr(error, name) for name in ("what", "found", "expected", "remedy")}
        raise EngineError(STAGE, **parts) from error
    identity = EngineIdentity(manifest.digest, __version__, executor.kernels, manifest.target.ranks)
    held = target.requires.memory_bytes + executor.num_blocks * executor.kv_block_bytes
    return DraftModel(executor, identity, DraftLengths(draft.tokens), prefix_cache=prefix_cache, memory_bytes=held)


def _cache_memory(options: Options, manifest: Manifest, model: Manifest) -> KvMemory:
    """The draft's cache: for as many tokens as the engine's own where their number is given, else a share of the memory."""
    if options.kv_tokens is not None:
        return KvMemory.parse(options.kv_tokens)
    own, other = manifest.target.requires.memory_bytes, model.target.requires.memory_bytes
    return KvMemory(share=_CACHE_SHARE * own / (own + other))


def _check_vocabulary(directory: Path, model: Manifest, draft_directory: Path, draft: Manifest) -> None:
    """Raise `EngineError` where two engines have different tokens. Tokenizers may differ in how they are written."""
    own, other = (manifest.files.get(_TOKENIZER) for manifest in (model, draft))
    if own and other and own.sha256 == other.sha256:
        return
    tokens = Tokenizer.from_file(directory / _TOKENIZER, model.special_tokens).vocabulary()
    drafted = Tokenizer.from_file(draft_directory / _TOKENIZER, draft.special_tokens).vocabulary()
    if tokens != drafted:
        different = sum(drafted.get(token) != number for token, number in tokens.items())
        found = f"{len(drafted)} tokens, of which {different} of the engine's {len(tokens)} are missing or have other numbers"
        raise _other_vocabulary(found, "the tokens of the engine")


def _check_fit(executor: Executor, draft: Executor) -> None:
    """Raise `EngineError` where the numbers of logits differ, or where the executor verifies no guesses."""
    if draft.vocab_size != executor.vocab_size:
        raise _other_vocabulary(f"{draft.vocab_size} logits", f"{executor.vocab_size}, as the engine has")
    if executor.batch.answers_apart:
        found = "an executor that computes the tokens of an answer one at a time"
        raise EngineError(STAGE, "this engine cannot verify guesses", found=found, remedy="load it without --draft")


def _other_vocabulary(found: str, expected: str) -> EngineError:
    remedy = "give a draft of the same model family and tokenizer"
    return EngineError(STAGE, "the draft has another vocabulary", found=found, expected=expected, remedy=remedy)


def _several_ranks(found: str) -> EngineError:
    return EngineError(STAGE, "ranks", found=found, expected="an engine of one rank", remedy="load it without --draft")
