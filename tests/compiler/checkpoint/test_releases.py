"""BELLE's releases as published, written small: logits of Transformers, ids of sentencepiece, templates of the cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.checkpoint.templates import render
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.reading import Reading
from belle_compile.runtime import artifact
from belle_compile.runtime.artifact import SpecialTokens
from belle_compile.runtime.chat import ChatEncoder
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.sentencepiece_rule import load
from belle_compile.runtime.tokenizer import Tokenizer
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, random_ids
from tests.releases import CHINESE, TEXT, belle_bloom, belle_llama, encrypted, key_file, original_llama

CONVERSATION = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好"},
    {"role": "user", "content": "再见"},
]
BLOOM = "Human: 你好\n\nAssistant:好\n\nHuman: 再见\n\nAssistant:"
LLAMA = "Human: \n你好\n\nAssistant: \n好</s>Human: \n再见\n\nAssistant: \n"
EXT = "Human: 你好\n\nBelle: 好\n\nHuman: 再见\n\nBelle: "


def prompt_of(checkpoint: Checkpoint, messages: list[dict[str, str]]) -> str:
    words = {name: checkpoint.special[name] or "" for name in ("bos_token", "eos_token")}
    return render(checkpoint.template, messages, **words)


def check(checkpoint: Checkpoint, reference: Path, conversation: str) -> None:
    """The checkpoint has the logits of Transformers for `reference`, and its prompts are those of the model card."""
    ids = random_ids(reference, 21)
    assert relative_error(Stepper(build_graph(checkpoint)).step({0: ids})[0], hf_logits(reference, ids)) < 1e-5
    assert prompt_of(checkpoint, CONVERSATION) == conversation
    assert prompt_of(checkpoint, CONVERSATION[:1]) == conversation[: conversation.index("好", 10)]
    assert checkpoint.special["add_bos"] is False


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False], ids=["with head", "without"])
def test_belle_7b(tmp_path: Path, prefix: str, tied: bool) -> None:
    """One pickle in float32, whose head is the embedding; and the settings of the card, since it has no file with any."""
    release = belle_bloom(tmp_path / "BELLE-7B-2M", prefix=prefix)
    (release / "generation_config.json").unlink()
    if tied:
        file = release / "pytorch_model.bin"
        state = torch.load(file, weights_only=True)
        torch.save(state | {"lm_head.weight": state[f"{prefix}word_embeddings.weight"]}, file)
    checkpoint = open_checkpoint(release)
    check(checkpoint, release, BLOOM)
    settings = {"temperature": 0.35, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.2, "max_new_tokens": 200}
    assert settings.items() <= checkpoint.generation.items()


Publish = Callable[[Path, Path], tuple[Path, Reading]]


def as_it_is(plain: Path, folder: Path) -> tuple[Path, Reading]:
    return plain, Reading()


def with_a_key(plain: Path, folder: Path) -> tuple[Path, Reading]:
    key = key_file(folder / "consolidated.00.pth")
    return encrypted(plain, key, folder / "release"), Reading(key=key)


def in_two_parts(plain: Path, folder: Path) -> tuple[Path, Reading]:
    return original_llama(plain, folder / "13B", parts=2), Reading()


@pytest.mark.parametrize(
    ("publish", "added", "conversation"),
    [
        pytest.param(as_it_is, (), LLAMA, id="BELLE-Llama2-13B-chat"),
        pytest.param(with_a_key, (), LLAMA, id="BELLE-LLaMA-7B-2M-enc"),
        pytest.param(with_a_key, CHINESE, EXT, id="BELLE-LLaMA-EXT-13B"),
        pytest.param(in_two_parts, (), LLAMA, id="LLaMA-13B"),
    ],
)
def test_llamas(tmp_path: Path, publish: Publish, added: tuple[str, ...], conversation: str) -> None:
    plain = belle_llama(tmp_path / "plain", added=added)
    release, reading = publish(plain, tmp_path)
    template = "belle-llama-ext" if added else None  # a small model has not the 79,458 rows by which it is told apart
    checkpoint = open_checkpoint(release, reading=reading, template=template)
    check(checkpoint, plain, conversation)
    tokenizer = load(checkpoint.tokenizer_json)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))
    for text in [*TEXT[:5], prompt_of(checkpoint, CONVERSATION[:1]), "春天的天气怎么样，写一首"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text) and tokenizer.decode(ids) == reference.decode(ids)
    assert checkpoint.special["eos_token_ids"] == [2] and checkpoint.special["bos_token"] == "<s>"


def test_conversations_have_the_ids_of_training(tmp_path: Path) -> None:
    """BELLE's train/src/sample_generator.py encodes each turn by itself, without BOS, and puts EOS after each answer alone."""
    plain = belle_llama(tmp_path / "plain")
    checkpoint = open_checkpoint(plain)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))
    trained: list[int] = []
    for message in CONVERSATION:
        if message["role"] == "user":
            trained += reference.encode(f"Human: \n{message['content']}\n\nAssistant: \n")
        else:
            trained += [*reference.encode(message["content"]), reference.eos_id()]
    special = SpecialTokens(1, (2,), None, bool(checkpoint.special["add_bos"]))
    template = ChatTemplate(artifact.PromptTemplate("belle-llama", checkpoint.template.jinja, "<s>", "</s>"))
    encoder = ChatEncoder(template, Tokenizer(load(checkpoint.tokenizer_json), special))
    question = encoder.encode(CONVERSATION[:1])
    assert question == trained[: len(question)] == reference.encode("Human: \n你好\n\nAssistant: \n")
    as_generated = [CONVERSATION[0], {"role": "assistant", "content": " 好"}, CONVERSATION[2]]
    assert encoder.encode(as_generated) == trained


def test_the_template_of_ext_is_known_by_its_vocabulary(tmp_path: Path) -> None:
    plain = belle_llama(tmp_path / "plain", vocab_size=79458, num_hidden_layers=1)
    assert open_checkpoint(plain).template.name == "belle-llama-ext"
