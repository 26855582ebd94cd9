"""Which config.json is accepted and how it is read; what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config
from transformers import LlamaConfig as HfLlamaConfig

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import bloom, build_graph, internlm2, llama, minicpm, mistral, qwen2, qwen3
from belle_compile.compiler.families.config import without_keys
from tests.compiler.families.helpers import fake_checkpoint
from tests.compiler.families.released_configs import BLOOM, INTERNLM2, LLAMA, MINICPM, MISTRAL, QWEN2, QWEN3

READ: dict[str, Any] = {
    module.FAMILY.name: module.read_config for module in (bloom, internlm2, llama, minicpm, mistral, qwen2, qwen3)
}
BASE: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
LONGER = {**BASE["llama"], "num_hidden_layers": 3, "max_position_embeddings": 512}
BASE |= {family: LONGER for family in ("internlm2", "minicpm", "mistral", "qwen2", "qwen3")}
RELEASED = {("llama", name): (config, HfLlamaConfig) for name, config in LLAMA.items()}
RELEASED |= {("mistral", name): (config, MistralConfig) for name, config in MISTRAL.items()}
RELEASED |= {("qwen2", name): (config, Qwen2Config) for name, config in QWEN2.items()}
RELEASED |= {("qwen3", name): (config, Qwen3Config) for name, config in QWEN3.items()}


def refusal(family: str, **changes: Any) -> str:
    with pytest.raises(CompileError) as caught:
        READ[family]({**BASE[family], **changes})
    return str(caught.value)


@pytest.mark.parametrize("name", BLOOM)
def test_released_bloom_configs_are_read(name: str) -> None:
    config = bloom.read_config(BLOOM[name])
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) == (250880, 4096, 30, 32)
    assert config.tied_head and config.max_position == 2048 and config.head_dim == 128


@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_released_configs_of_decoders_are_read_as_transformers_reads_them(family: str, name: str) -> None:
    values, transformers = RELEASED[family, name]
    config, expected = READ[family](values), transformers(**values)
    head_dim = getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (
        expected.vocab_size, expected.hidden_size, expected.intermediate_size, expected.num_hidden_layers,
    )  # fmt: skip
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (
        expected.num_attention_heads, expected.num_key_value_heads, head_dim,
    )  # fmt: skip
    assert (config.epsilon, config.tied_head) == (expected.rms_norm_eps, expected.tie_word_embeddings)
    assert config.rope.max_position == expected.max_position_embeddings
    assert set(config.windows) == {getattr(expected, "sliding_window", None) or 0}


def test_released_configs_of_internlm2_are_read() -> None:
    config = internlm2.read_config(INTERNLM2["internlm2_5-7b-chat"])
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.biases.qkv) == (32, 8, 128, False)
    assert (config.max_position, config.rope.dynamic_factor, config.rope.original_max) == (65536, 2.0, 32768)


def test_released_configs_of_minicpm_are_read() -> None:
    config = minicpm.read_config(MINICPM["MiniCPM-2B-sft-bf16"])
    assert (config.num_layers, config.num_heads, config.head_dim, config.tied_head) == (40, 36, 64, True)
    assert config.branch_scale == pytest.approx(1.4 / 40**0.5 / 12) and config.head_scale == 256 / 2304
    assert config.epsilon == pytest.approx(1e-5 / 144)


_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("qwen2", {}, (0, 0, 0)),
        ("qwen2", {"sliding_window": 100, "max_window_layers": 0}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, (0, 100, 100)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100}, (0, 0, 0)),  # from layer 28 on
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "layer_types": _TYPES}, (100, 0, 100)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}, (0, 0, 0)),  # no effect
        ("mistral", {}, (0, 0, 0)),  # Transformers' default, 4096, is longer than the longest sequence
        ("mistral", {"sliding_window": 64}, (64, 64, 64)),
        ("mistral", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3}, (64, 64, 64)),
        ("mistral", {"max_position_embeddings": 8192}, (4096, 4096, 4096)),
        ("mistral", {"max_position_embeddings": 8192, "sliding_window": None}, (0, 0, 0)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, (0, 0, 64)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (0, 0, 0)),
    ],
)
def test_windows_of_layers(family: str, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert READ[family]({**BASE[family], **changes}).windows == windows


WRITTEN = {
    "bloom": BloomConfig,
    "llama": HfLlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


@pytest.mark.parametrize(("family", "config"), WRITTEN.items())
def test_everything_that_transformers_5_can_write_is_accepted(family: str, config: Any) -> None:
    READ[family](config().to_dict())


def test_bloom_names_of_one_value_must_agree() -> None:
    assert (
        bloom.read_config({**BASE["bloom"], "n_embed": 32, "num_hidden_layers": 2, "num_attention_heads": 4}).hidden_size == 32
    )
    assert "hidden_size 32, n_embed 64" in refusal("bloom", n_embed=64)


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("llama", "hidden_act", "gelu", "found 'gelu', expected no value or 'silu' or 'swish'"),
        ("llama", "sliding_window", 4096, "found 4096, expected no value"),
        ("llama", "layer_types", ["full_attention", "sliding_attention"], "expected no value or 'full_attention'"),
        ("llama", "quantization_config", {"quant_method": "gptq"}, "quantised checkpoints are not supported"),
        ("llama", "final_logit_softcapping", 30.0, "found 30.0, expected no value"),
        ("llama", "logit_scale", 0.0625, "expected no value or 1.0"),
        ("llama", "rope_interleaved", True, "expected no value or False"),
        ("llama", "partial_rotary_factor", 0.5, "found 0.5, expected no value or 1.0"),
        ("llama", "num_key_value_heads", 3, "found 3, expected a divisor of num_attention_heads, 4"),
        ("llama", "num_attention_heads", 5, "found 5, expected a divisor of hidden_size, 32, or a head_dim"),
        ("llama", "head_dim", 15, "found 15, expected an even head size"),
        ("llama", "rms_norm_eps", 0, "found 0, expected a number > 0"),
        ("llama", "attention_bias", "yes", "found 'yes', expected true or false"),
        ("llama", "num_hidden_layers", 2.5, "found 2.5, expected a whole number >= 1"),
        ("llama", "vocab_size", None, "found nothing, expected a value"),
        ("llama", "vocab_size", True, "found True, expected a whole number"),
        ("llama", "num_experts", 8, "found 8, expected a key this compiler knows; remove the key if"),
        ("llama", "is_causal", False, "found False, expected no value or True"),
        ("llama", "quantization", {"bits": 4}, "quantised checkpoints are not supported"),
        ("llama", "alibi", True, "found True, expected no value or False"),
        ("minicpm", "num_experts", 8, "expected a key this compiler knows"),
        ("minicpm", "sparse_config", {"kernel_size": 32}, "expected a key this compiler knows"),
        ("minicpm", "scale_emb", 0, "found 0, expected a number > 0"),
        ("mistral", "layer_types", _TYPES, "found full_attention, sliding_attention, expected sliding_attention alone"),
        ("qwen2", "layer_types", ["full_attention"], "expected full_attention or sliding_attention for each of 3 layers"),
        ("qwen2", "layer_types", _TYPES, "expected use_sliding_window and a sliding_window, or full_attention alone"),
        ("qwen2", "use_sliding_window", 1, "found 1, expected true or false"),
        ("qwen2", "use_mrope", True, "found True, expected no value or False"),
        ("qwen2", "attention_bias", False, "expected a key this compiler knows"),
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 262144}, "expected a key this compiler knows"),
        ("bloom", "n_inner", 100, "found 100, expected no value, or 128, four times the hidden size"),
        ("bloom", "hidden_act", "relu", "found 'relu'"),
        ("bloom", "n_head", 5, "found 5, expected a divisor of the hidden size, 32"),
        ("bloom", "rope_theta", 10000.0, "expected a key this compiler knows"),
        ("bloom", "layer_norm_epsilon", -1.0, "found -1.0, expected a number > 0"),
    ],
)
def test_a_key_that_would_change_results_is_named(family: str, key: str, value: object, words: str) -> None:
    message = refusal(family, **{key: value})
    assert message.startswith(f"config: key {key} of ") and words in message


def test_slow_but_exact_is_refused_only_where_it_changes_results() -> None:
    assert "slow_but_exact" in refusal("bloom", slow_but_exact=True, pretraining_tp=4)
    bloom.read_config({**BASE["bloom"], "slow_but_exact": True, "pretraining_tp": 1})
    bloom.read_config({**BASE["bloom"], "slow_but_exact": False, "pretraining_tp": 4})


def test_unknown_keys_that_are_null_are_let_pass() -> None:
    llama.read_config({**BASE["llama"], "num_experts": None, "quantization_config": None, "head_dim": None})


HARMLESS = {
    "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
    "dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "attention_dropout_prob": 0.1,
    "classifier_dropout": 0.0,
    "lora_dropout": 0.05,
    "drop_path_rate": 0.1,
    "emb_pdrop": 0.1,
    "end_token_id": 2,
    "eos_id": 2,
    "tensor_model_parallel_size": 4,
    "im_end_token_id": 3,
    "decoder_end_token_ids": [1, 2],
    "neftune_noise_alpha": 5,
    "trust_remote_code": True,
    "n_positions": 2048,
    "n_ctx": 2048,
    "max_window_layers": 28,
    "is_causal": True,
    "ds_config": {},
    "use_flash_attn": True,
    "unsloth_tied": True,
    "min_p": 0.05,
    "chat_template": "x",
}


@pytest.mark.parametrize("family", READ)
def test_keys_of_trainers_and_forks_that_change_nothing(family: str) -> None:
    READ[family]({**BASE[family], **HARMLESS})


def test_transformers_computes_the_same_with_these_keys() -> None:
    """What makes them harmless: the graph's reference does not read them."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(HfLlamaConfig(**BASE["llama"])).eval()
    keyed = LlamaForCausalLM(HfLlamaConfig(**{**HARMLESS, **BASE["llama"]})).eval()
    keyed.load_state_dict(plain.state_dict())
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, keyed(ids).logits)


def test_all_unknown_keys_are_in_one_message() -> None:
    message = refusal("llama", qk_scale=2, num_experts=8, dropout=0.1, gated=None)
    assert message == (
        "config: keys qk_scale, num_experts of config.json: found 2, 8, expected keys this compiler knows; remove the keys if "
        "the model gives the same results without them, or pass --ignore-config-key qk_scale --ignore-config-key num_experts."
    )
    one = refusal("bloom", qk_scale=2)
    assert one.endswith("gives the same results without it, or pass --ignore-config-key qk_scale.")


def test_keys_that_are_ignored_on_request() -> None:
    config = {**BASE["llama"], "num_experts": 8, "sliding_window": 4096}
    kept, notes = without_keys(config, ("num_experts", "sliding_window"), llama.KEYS.used)
    assert kept == BASE["llama"] and llama.read_config(kept)
    assert notes == [
        "key num_experts of config.json, 8, was ignored because --ignore-config-key asked for it",
        "key sliding_window of config.json, 4096, was ignored because --ignore-config-key asked for it",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hidden_size", "found a key that the model is built from, expected another key; change it in config.json"),
        ("num_expert", r"found no such key in config.json; did you mean num_experts?"),
        ("xyz", "found no such key in config.json; leave the option out"),
    ],
)
def test_keys_that_cannot_be_ignored(name: str, words: str) -> None:
    with pytest.raises(CompileError) as caught:
        without_keys({**BASE["llama"], "num_experts": 8}, (name,), llama.KEYS.used)
    assert str(caught.value).startswith(f"config: --ignore-config-key {name}: {words}")


def test_an_architecture_that_is_no_family_is_refused() -> None:
    with pytest.raises(CompileError, match=r"architecture of fake: found 'gpt2', expected one of bloom, llama"):
        build_graph(fake_checkpoint("gpt2", {}, {}))


def test_configs_saved_by_transformers_are_read_back_the_same(tmp_path: Path) -> None:
    """Every key that a checkpoint in the wild has passed through save_pretrained."""
    for name, config in LLAMA.items():
        HfLlamaConfig(**config).save_pretrained(tmp_path / name)
        saved = HfLlamaConfig.get_config_dict(tmp_path / name)[0]
        again, first = llama.read_config(saved), llama.read_config(config)
        assert again.metadata == first.metadata
        assert again.rope.inv_freq.tolist() == first.rope.inv_freq.tolist()
