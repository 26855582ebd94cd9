"""A new family is one module, `tinyseed`, and one line, `register(tinyseed.FAMILY)`: nothing else has to know of it."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import SeedOssConfig, SeedOssForCausalLM

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.templates import render
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph, decoder, register, registry
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.artifact import read_manifest
from tests.compiler.families import tinyseed
from tests.compiler.families.helpers import rewrite_config, rewrite_tensors
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_greedy, hf_logits, make_relative, random_ids

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-5
ONE = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    register(tinyseed.FAMILY)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Seed-OSS as Transformers writes it: biases of q, k and v, none of o."""
    folder = tmp_path_factory.mktemp("seed_oss")
    return make_relative(SeedOssForCausalLM, SeedOssConfig, folder, name="seed_oss", head_dim=16, num_key_value_heads=2)


@pytest.fixture
def checkpoint(transformers: Path, tmp_path: Path) -> Path:
    """The same as tinyseed, which names some tensors otherwise."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            stored = re.sub(r"self_attn\.([qkvo])_proj", r"attention.w\1", name)
            tensors[re.sub(r"^model\.", "tiny.", stored)] = tensors.pop(name)

    shutil.copytree(transformers, tmp_path / "tiny-seed")
    return rewrite_config(rewrite_tensors(tmp_path / "tiny-seed", rename), model_type="tinyseed")


def logits_error(path: Path, transformers: Path) -> float:
    """Of the graph's logits, relative to those of Transformers."""
    ids = random_ids(transformers, 21)
    return relative_error(Stepper(build_graph(open_checkpoint(path))).step({0: ids})[0], hf_logits(transformers, ids))


def test_its_checkpoints_are_opened_by_name_alias_and_architecture(checkpoint: Path, transformers: Path) -> None:
    opened, by_alias = open_checkpoint(checkpoint), open_checkpoint(transformers)
    assert opened.family == by_alias.family == "tinyseed"
    assert set(opened.tensors) == set(by_alias.tensors)
    biases = {name for name in opened.tensors if name.startswith("model.layers.0.") and name.endswith(".bias")}
    assert biases == {f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"}
    rewrite_config(checkpoint, model_type=None, architectures=["TinySeedForCausalLM"])
    assert open_checkpoint(checkpoint).family == "tinyseed"


def test_its_logits_are_those_of_transformers(checkpoint: Path, transformers: Path) -> None:
    assert logits_error(checkpoint, transformers) < TOLERANCE
    assert logits_error(transformers, transformers) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": True, "o": True}, r"tensor model\.layers\.0\.self_attn\.o_proj\.bias of .*: found no such tensor"),
        (
            {"qkv": False},
            r"tensors of .*: found model\.layers\.0\.self_attn\.k_proj\.bias, .*, which the graph does not use",
        ),
    ],
)
def test_biases_of_q_k_v_and_of_o_are_apart(checkpoint: Path, change: dict[str, bool], message: str) -> None:
    def read_config(config: Mapping[str, Any]) -> decoder.DecoderConfig:
        return replace(tinyseed.read_config(config), biases=decoder.Biases(**change))

    registry.REGISTRY["tinyseed"] = replace(tinyseed.FAMILY, read_config=read_config)
    with pytest.raises(CompileError, match=message):
        build_graph(open_checkpoint(checkpoint))


def test_its_graph_says_which_family_it_is(checkpoint: Path) -> None:
    model = build_graph(open_checkpoint(checkpoint))
    assert model.graph.name == model.metadata_props["family"] == "tinyseed"


def test_its_config_is_read_strictly(checkpoint: Path) -> None:
    rewrite_config(checkpoint, attention_bias=False)
    with pytest.raises(CompileError, match=r"key attention_bias of config\.json: found False, expected no value or True"):
        build_graph(open_checkpoint(checkpoint))


@pytest.mark.parametrize("tied", [False, True])
def test_plans_take_its_config_alone(checkpoint: Path, tied: bool) -> None:
    if tied:
        rewrite_tensors(rewrite_config(checkpoint, tie_word_embeddings=True), lambda tensors: tensors.pop("lm_head.weight"))
    of_config, of_checkpoint = (
        plan(path, "a100", "int8", Load(1, 64)) | {"model": ""} for path in (checkpoint / "config.json", checkpoint)
    )
    assert of_config == of_checkpoint and "needed_bytes" in of_config["plan"][0]


def write_gguf(checkpoint: Path, file: Path) -> Path:
    """Write the checkpoint as GGUF, its rows in the order of Transformers; its tokenizer.json goes beside it."""
    opened = open_checkpoint(checkpoint)
    parts = {module: part for part, module in tinyseed.GGUF.modules.items()}
    writer, config = gguf.GGUFWriter(file, "tinyseed"), opened.config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in opened.tensors.items():
        module, _, kind = name.rpartition(".")
        layer, module = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)", module).groups()  # type: ignore[union-attr]
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{parts[module]}.{kind}", tensor.read())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copy(checkpoint / "tokenizer.json", file.parent)
    return file.parent


def test_its_gguf_files_are_opened_by_their_architecture(checkpoint: Path, transformers: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    folder = write_gguf(checkpoint, tmp_path / "gguf" / "m.gguf")
    opened = open_checkpoint(folder)
    assert opened.family == opened.config["model_type"] == "tinyseed"
    assert opened.config["architectures"] == ["TinySeedForCausalLM"]
    assert logits_error(folder, transformers) < TOLERANCE
    registry.REGISTRY.pop("tinyseed")
    with pytest.raises(CompileError, match="found architecture tinyseed, expected bloom, llama"):
        open_checkpoint(folder)


def test_its_template_is_the_default_of_its_checkpoints(checkpoint: Path) -> None:
    template = open_checkpoint(checkpoint).template
    assert template.name == "tinyseed"
    assert render(template, ONE, bos_token="<s>", eos_token="</s>") == "<|user|>hello<|assistant|>"
    assert open_checkpoint(checkpoint, template="belle-bloom").template.name == "belle-bloom"
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert open_checkpoint(checkpoint).template.name == "chat_template.jinja"
    (checkpoint / "chat_template.jinja").unlink()
    assert open_checkpoint(rewrite_config(checkpoint, vocab_size=313)).template.name == "raw"


def test_a_family_without_a_template_gets_that_of_no_other(checkpoint: Path) -> None:
    registry.REGISTRY["tinyseed"] = replace(tinyseed.FAMILY, template="")
    message = (
        r"prompt template: found none in the checkpoint, and no default for the TinySeed family, expected the template that "
        r"this model was trained with; give it with --template NAME\|FILE \(belle-bloom, .*\), or as chat_template\.jinja"
    )
    with pytest.raises(CompileError, match=message):
        open_checkpoint(checkpoint)
    assert open_checkpoint(checkpoint, template="raw").template.name == "raw"
    assert "needed_bytes" in plan(checkpoint, "a100", "int8", Load(1, 64))["plan"][0], "a plan renders no prompts"
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert open_checkpoint(checkpoint).template.name == "chat_template.jinja"


def test_its_engine_answers_as_transformers(checkpoint: Path, transformers: Path, tmp_path: Path) -> None:
    engine = build(BuildRequest(checkpoint, tmp_path / "engine", quantization="none", isas=("avx2",)))
    manifest = read_manifest(engine)
    assert (manifest.model.family, manifest.prompt_template.name) == ("tinyseed", "tinyseed")
    ids = random_ids(transformers, 9)
    with Engine.load(engine, threads=2, kv_tokens=256) as loaded:
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=16, ignore_eos=True)
        (result,) = loaded.generate(ids, params)
    assert result.token_ids == hf_greedy(transformers, ids, 16)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"name": "LLAMA"}, "llama"),
        ({"aliases": ("bloom",)}, "bloom"),
        ({"architectures": ("LlamaForCausalLM",)}, "llamaforcausallm"),
        ({"gguf": replace(tinyseed.GGUF, architectures=("llama",))}, "llama"),
    ],
)
def test_two_families_have_no_name_in_common(changes: dict[str, Any], taken: str) -> None:
    registry.REGISTRY.pop("tinyseed")
    with pytest.raises(ValueError, match=rf": {taken} belongs to (llama|bloom) already"):
        register(replace(tinyseed.FAMILY, **changes))


def test_refusals_name_it(checkpoint: Path) -> None:
    with pytest.raises(
        CompileError, match=r"found 'gpt2', expected bloom, llama, .* or tinyseed; .*BLOOM, LLaMA, .* or TinySeed family"
    ):
        open_checkpoint(rewrite_config(checkpoint, model_type="gpt2"))


# Files in which llama and bloom are kinds of tokenizers of GGUF, or of models of GenAI, or in which llama is the one model that
# was published in a format.
KINDS = {"gguf_tokenizer.py", "gguf_rules.py", "gguf_vocabulary.py", "genai.py", "original_llama.py"}


def names_of_families(source: Path) -> Iterator[str]:
    """Constants that are the name of a family, or begin with one and a dot; and comparisons of something called family."""
    names = {name for family in registry.REGISTRY.values() for name in family.names}
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.value.startswith("llama.cpp"):
            pass
        elif node.value.lower().split(".")[0] in names:
            yield f"{source.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        if isinstance(node, ast.Compare) and any(
            (getattr(side, "id", "") or getattr(side, "attr", "")) == "family" for side in (node.left, *node.comparators)
        ):
            yield f"{source.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_nothing_else_knows_families_by_name() -> None:
    outside = [
        source
        for package in ("compiler", "passes", "runtime")
        for source in sorted((ROOT / package).rglob("*.py"))
        if source.parent.name != "families" and source.name not in KINDS
    ]
    assert len(outside) > 100
    assert [line for source in outside for line in names_of_families(source)] == []
    assert any(names_of_families(ROOT / "compiler" / "families" / "llama.py")), "the search finds what it looks for"
