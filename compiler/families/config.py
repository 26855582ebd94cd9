"""Strict reading of config.json: a key is used, known to be harmless, restricted to harmless values, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import BelleError
from belle_compile.runtime.json_reader import JsonReader, short

STAGE = "config"
MOST_LAYERS = 10_000  # lists with an entry for each layer are made before any tensor is looked for

# Keys that Transformers 4 and 5, trainers and converters write; none of them changes a forward pass in evaluation mode.
HARMLESS = frozenset(
    # Bookkeeping.
    """_name_or_path name_or_path _commit_hash architectures model_type transformers_version finetuning_task
    task_specific_params problem_type id2label label2id num_labels prefix tokenizer_class tokenizer_model_max_length
    tokenizer_padding_side model_max_length transformers.js_config transformers_weights unsloth_version unsloth_fixed
    is_llama_config license auto_map trust_remote_code custom_pipelines base_model base_model_name_or_path model_name
    language languages tags datasets library_name pipeline_tag revision ds_config deepspeed deepspeed_config fsdp_config
    train_args training_args wandb_project hf_token is_composition
    """.split()
    # Special tokens, which compiler/checkpoint reads.
    + """bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    bos_token eos_token pad_token unk_token additional_special_tokens chat_template bos_id eos_id pad_id unk_id
    """.split()
    # How to compute, not what: the weights' dtype on disk, kernels, caching, what a forward call returns.
    + """torch_dtype dtype use_bfloat16 use_cache torchscript output_attentions output_hidden_states return_dict
    chunk_size_feed_forward tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention
    use_flash_attention_2 gradient_checkpointing gradient_checkpointing_kwargs use_sdpa_attention use_memory_efficient_attention
    use_reentrant use_xformers use_liger_kernel fused_attention use_fused_rmsnorm fuse_cross_entropy fuse_norm fuse_swiglu
    fp16 bf16 fp32 tf32 keep_in_fp32 low_cpu_mem_usage device_map tensor_parallel_degree model_parallel sequence_parallel
    past_key_values cache_implementation cache_config use_cache_quantization use_cache_kernel onnx_safe scan_layers remat
    """.split()
    # Training.
    + """initializer_range initializer_factor init_std init_method init_device initialization label_smoothing
    z_loss z_loss_weight ignore_index loss_type loss_function layerdrop stochastic_depth_prob router_aux_loss_coef
    mlm_probability lora_target_modules num_train_epochs learning_rate weight_decay warmup_steps warmup_ratio seed
    """.split()
    # Lengths of the training data or of a window that is not used, beside the keys that families read.
    + """n_positions n_ctx max_seq_len max_seq_length max_sequence_length seq_len max_window_layers sliding_window_pattern
    """.split()
    # Heads for other tasks.
    + """classifier_dropout classifier_bias pooler_type pooling_type score_bias summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj
    """.split()
    # Generation settings, which Transformers 4 kept here; compiler/checkpoint reads them from generation_config.json.
    + """assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p min_p top_h min_new_tokens max_time stop_strings num_return_sequences
    penalty_alpha guidance_scale renormalize_logits sequence_bias force_words_ids constraints token_healing watermarking_config
    low_memory output_logits prompt_lookup_num_tokens max_matching_ngram_size generation_config
    """.split()
)
# Kinds of keys that change no forward pass in evaluation mode, whatever their prefix: probabilities of dropping something in
# training, ids of tokens with a role, settings of Transformers' attention kernels, and what one trainer writes.
HARMLESS_KINDS = re.compile(
    r".*dropout.*|.*_pdrop|.*drop_?path.*|.*drop_?rate.*|.*_token_ids?|.*_token_index|(use_)?flash_?att(n|ention).*|.*parallel_size"
    r"|_attn_implementation.*|unsloth_.*|wandb_.*|neftune_.*"
)

# Keys of other architectures and of forks, each with the values at which they do not change the families' graphs.
FIXED: Mapping[str, tuple[object, ...]] = {
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "layer_types": ("full_attention",),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "per_layer_config": ({},),
    "is_causal": (True,),
    "causal": (True,),
    "bidirectional": (False,),
    "use_bidirectional_attention": (False,),
    "num_nextn_predict_layers": (0,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "scale_attn_weights": (True,),
    "rotary_pct": (1.0,),
    "quantization": (),
    "compression_config": (),
}
_QUANTIZED = "quantised checkpoints are not supported: give the checkpoint it was made from"
REMEDIES = dict.fromkeys(("quantization_config", "quantization", "compression_config"), _QUANTIZED)


@dataclass(frozen=True)
class Keys:
    """How a family treats each key of config.json; a key that is in none of the three fields is refused unless it is null.

    The family reads the `used` keys. Those in `harmless` do not change results. Those in `fixed` could, so their value must be
    null or one of those listed (for a list, each of its items must). HARMLESS, HARMLESS_KINDS and FIXED are added to the last
    two.
    """

    used: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise CompileError for a key whose value requires something that the family's graph does not compute, or for all keys
        that are not known."""
        fixed = {**FIXED, **self.fixed}
        unknown = []
        for key, value in config.items():
            if value is None or key in self.used or key in self.harmless or key in HARMLESS:
                continue
            if key not in fixed:
                unknown += [] if HARMLESS_KINDS.fullmatch(key) else [key]
                continue
            values = value if isinstance(value, list) else [value]
            if not all(item in fixed[key] for item in values):
                supported = " or ".join(["no value", *map(repr, fixed[key])])
                raise Reader(config).error(key, short(value), supported, REMEDIES.get(key, ""))
        if unknown:
            raise _unknown(config, unknown)


def without_keys(config: Mapping[str, Any], names: Sequence[str], used: Set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return config.json without keys that the user asked to ignore, and a note on each.

    Raises CompileError for a key that it does not have, and for one that the family reads, which are the `used` ones.
    """
    notes = []
    for name in names:
        if name not in config:
            near = get_close_matches(name, config, n=1)
            remedy = f"did you mean {near[0]}?" if near else "leave the option out"
            raise CompileError(STAGE, f"--ignore-config-key {name}", found="no such key in config.json", remedy=remedy)
        if name in used:
            found, remedy = "a key that the model is built from", "change it in config.json if it is wrong"
            raise CompileError(STAGE, f"--ignore-config-key {name}", found=found, expected="another key", remedy=remedy)
        notes.append(f"key {name} of config.json, {short(config[name])}, was ignored because --ignore-config-key asked for it")
    return {key: value for key, value in config.items() if key not in names}, notes


def _unknown(config: Mapping[str, Any], keys: Sequence[str]) -> BelleError:
    """The error for all keys that a family does not know."""
    options = " ".join(f"--ignore-config-key {key}" for key in keys)
    if len(keys) == 1:
        remedy = f"remove the key if the model gives the same results without it, or pass {options}"
        return Reader(config).error(keys[0], short(config[keys[0]]), "a key this compiler knows", remedy)
    remedy = f"remove the keys if the model gives the same results without them, or pass {options}"
    return CompileError(
        STAGE,
        f"keys {', '.join(keys)} of {Reader(config).where}",
        found=", ".join(short(config[key]) for key in keys),
        expected="keys this compiler knows",
        remedy=remedy,
    )


@dataclass(frozen=True)
class Reader(JsonReader):
    """Reads config.json; raises CompileError."""

    stage: ClassVar[str] = STAGE
    failure: ClassVar[type[BelleError]] = CompileError
