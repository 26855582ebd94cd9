"""The keys and values that config.json of the supported models has, in the forms of Transformers 4.20 to 5; no copies."""

from __future__ import annotations

from typing import Any

_BLOOM_LARGE = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
    "model_type": "bloom", "n_inner": None, "n_layer": 30, "offset_alibi": 100, "pretraining_tp": 4, "skip_bias_add": True,
    "skip_bias_add_qkv": False, "use_cache": True, "vocab_size": 250880,
}  # fmt: skip

BLOOM: dict[str, dict[str, Any]] = {
    # Transformers 4.20's names.
    "bloom-7b1": {**_BLOOM_LARGE, "architectures": ["BloomForCausalLM"], "n_embed": 4096, "num_attention_heads": 32,
                  "seq_length": 2048, "transformers_version": "4.20.0"},
    "BELLE-7B-2M": {**_BLOOM_LARGE, "_name_or_path": "bloomz-7b1-mt", "architectures": ["BloomForCausalLM"],
                    "hidden_size": 4096, "n_head": 32, "slow_but_exact": False, "torch_dtype": "float32",
                    "transformers_version": "4.27.1", "use_cache": False},
    "saved by Transformers 5": {
        "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2, "hidden_dropout": 0.0, "hidden_size": 4096,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "bloom", "n_head": 32, "n_layer": 30,
        "pad_token_id": None, "pretraining_tp": 1, "slow_but_exact": False, "tie_word_embeddings": True,
        "transformers_version": "5.23.0", "use_cache": True, "vocab_size": 250880,
    },
}  # fmt: skip

_LLAMA_SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_LLAMA3_SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-05}  # fmt: skip
_LLAMA3_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3"}  # fmt: skip

LLAMA: dict[str, dict[str, Any]] = {
    "LLaMA-7B of early 2023": {
        **_LLAMA_SIZES, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "max_sequence_length": 2048, "model_type": "llama", "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    },
    "BELLE-LLaMA-EXT-7B": {
        **_LLAMA_SIZES, "_name_or_path": "llama-7b-ext", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 2048,
        "max_sequence_length": 2048, "model_type": "llama", "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": False,
        "vocab_size": 79458,
    },
    "Llama-2-13b-chat": {
        "_name_or_path": "meta-llama/Llama-2-13b-chat-hf", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 13824, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 40, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0",
        "use_cache": True, "vocab_size": 32000, "max_length": 4096, "do_sample": True, "temperature": 0.9, "top_p": 0.6,
    },
    "Llama-3.1-8B": {
        **_LLAMA3_SIZES, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1,
        "rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": True,
    },
    "Llama-3.1-8B saved by Transformers 5": {
        **_LLAMA3_SIZES, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "dtype": "bfloat16", "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "pad_token_id": None, "pretraining_tp": 1, "rope_parameters": {**_LLAMA3_ROPE, "rope_theta": 500000.0},
        "tie_word_embeddings": False, "transformers_version": "5.23.0", "use_cache": True,
    },
    "TinyLlama-1.1B-Chat": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True,
        "vocab_size": 32000,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "use_cache": True,
        "vocab_size": 49152,
    },
}  # fmt: skip

_QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
         "initializer_range": 0.02, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": True,
         "use_sliding_window": False}  # fmt: skip

QWEN2: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-Instruct": {
        **_QWEN, "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "transformers_version": "4.43.1", "vocab_size": 152064,
    },
    "Qwen2.5-0.5B": {
        **_QWEN, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "transformers_version": "4.40.1", "use_mrope": False, "vocab_size": 151936,
    },
}  # fmt: skip

QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.51.0",
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "transformers_version": "4.51.0",
        "vocab_size": 151936,
    },
}  # fmt: skip

_MISTRAL = {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "initializer_range": 0.02, "model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}  # fmt: skip

MISTRAL: dict[str, dict[str, Any]] = {
    "Mistral-7B-Instruct-v0.1": {
        **_MISTRAL, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_hidden_layers": 32,
        "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
    },
    "Mistral-7B-Instruct-v0.3": {
        **_MISTRAL, "attention_dropout": 0.0, "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_hidden_layers": 32, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
    },
    "Mistral-Nemo-Instruct-2407": {
        **_MISTRAL, "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_hidden_layers": 40, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.43.0.dev0", "vocab_size": 131072,
    },
}  # fmt: skip

INTERNLM2: dict[str, dict[str, Any]] = {
    "internlm2_5-7b-chat": {
        "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}, "bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "internlm2", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.0", "use_cache": True, "vocab_size": 92544,
    },
}  # fmt: skip

MINICPM: dict[str, dict[str, Any]] = {
    "MiniCPM-2B-sft-bf16": {
        "architectures": ["MiniCPMForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "bos_token_id": 1, "dim_model_base": 256, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2304,
        "initializer_range": 0.1, "intermediate_size": 5760, "max_position_embeddings": 4096, "model_type": "minicpm",
        "num_attention_heads": 36, "num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "scale_depth": 1.4, "scale_emb": 12, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0", "use_cache": True, "vocab_size": 122753,
    },
}  # fmt: skip
