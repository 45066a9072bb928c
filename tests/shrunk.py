"""Every decoder that transformers knows, shrunk until it can be built and run in a fraction of a second."""

import re
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tiny

NUM_SPECIAL = 28
"""The last ids may stand for images: prompts have none of them."""

_VOCABULARY = r"(\w+_)?vocab_size(_\w+)?|n_vocab|vocab_offset|codebook_size|num_embeddings"
_POSITIONS = r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length"
# setting -> size; the last that fits counts, and a setting that is smaller already is left alone
_SIZES: list[tuple[str, int]] = [
    (r"(num_)?(\w+_)?(hidden_|encoder_|decoder_)?layers|n_layers?|depth|num_blocks|resampler_depth", 4),
    (r"num_layers_per_stack", 1),
    (r"(\w+_)?attention_heads|n_heads?|num_heads|\w+_n_heads|resampler_heads|linear_num_(value_)?heads", 4),
    (r"\w*num_key_value_heads|num_kv_heads|linear_num_key_heads|num_query_groups", 2),
    (r"head_dim|\w+_head_dim|d_kv|d_head|kv_channels|attention_head_dim|resampler_dim_head|dim_head", 16),
    (r"query_pre_attn_scalar", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"\w+_lora_rank|laurel_rank|hc_lowrank|d_rel|gated_norm_rank|adapter_rank", 16),
    (r"(\w+_)?hidden_size(_\w+)?|d_model|n_embd|dim|\w*embed_dim|width|lru_width|emb_dim|embedding_(size|dim)", 64),
    (r"(\w+_)?(output|proj|projection|projector\w*|adapter\w*)_dim|word_embed_proj_dim|out_hidden_size", 64),
    (r"(\w+_)?intermediate_size(_\w+)?|\w*ffn_dim|d_ff|dff|dim_ff|mlp_dim|d_inner|\w*ffn_hidden_size|n_inner", 64),
    (r"feed_forward_size|share_expert_dim", 64),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|topk_group|n_group|num_expert_group|n_shared_experts", 2),
    (r"(\w+_)?sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", 16),
    (r"_?sliding_window_pattern|no_rope_layer_interval|global_attn_every_n_layers", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"mamba_d_state|state_size|ssm_state_size|linear_(key_|value_)?head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim|mamba_dt_rank|time_step_rank", 32),
    (r"(mamba_)?chunk_size|index_topk|index_topk_blocks|index_block_size|index_head_dim", 16),
    (r"n_groups|mamba_n_groups", 2),
    (r"encoder_hash_byte_group_vocab", 128),
    (r"image_size|max_image_size|img_size", 32),
]
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_BY_KIND = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
_DENSE = {"num_key_value_heads": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}

# what a type needs besides: its default config cannot be built, or is one whose layers all have a window
_BESIDE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mistral3": {"text_config": {"sliding_window": None}},
    "idefics2": {"text_config": {"sliding_window": None}},
    "gemma3_text": _MIXED,
    "gemma3": {"text_config": _MIXED},
    "shieldgemma2": {"text_config": _MIXED},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bailing_hybrid": {"layer_group_size": 2},
    "evolla": _DENSE,
    "dots3_note_text": _DENSE,
    "glm5_next": {"text_config": _DENSE},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "dots1": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True},
    "nemotron_h": {"layer_types": ["mamba", "moe", "attention", "moe"]},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "zamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "attention_hidden_size": 128},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "chameleon": {"vocabulary_map": {"<image>": 101}},
    "cohere_compass_text": _BY_KIND,
    "cohere_compass": {"text_config": _BY_KIND},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 4}},
    "diffusion_gemma": {
        "text_config": {
            **_MIXED,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "per_layer_config": None,
        }
    },
    "dots3_note": {"text_config": {**_DENSE, "per_layer_config": None}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "full_attention"] * 2}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 2]}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, **_SECTIONS}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
        }
    },
    "deepseek_v4": {"layer_types": ["sliding_attention", "compressed_sparse_attention"] * 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


for _type in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl"):
    _BESIDE[_type] = {"text_config": _SECTIONS}

_STARTS = {"vision_start_token_id": 101, "vision_end_token_id": 102, "audio_start_token_id": 103}
_BESIDE["qwen2_5_omni_thinker"] = {"text_config": _SECTIONS, **_STARTS}
_BESIDE["qwen3_omni_moe_thinker"] = _STARTS
_BESIDE["glm4v_moe"] = {
    "text_config": {"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [2, 1, 1]}}
}


def types() -> dict[str, Any]:
    """Model type -> transformers' class that builds it: causal language models, and those of images and text."""
    causal = dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    return {
        **dict.fromkeys(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
        **causal,
    }


def build(
    model_type: str,
    attn_implementation: str | None = None,
    *,
    vocab_size: int = tiny.VOCAB_SIZE,
    num_positions: int = 512,
    **changes: Any,
) -> PreTrainedModel:
    """A model of this type with seeded random weights, in float32.

    Args:
        attn_implementation: None: sdpa, where the type has it.
        changes: to its config, nested like it.
    """
    own = config(model_type, vocab_size, num_positions, **changes)
    model = types()[model_type].from_config(own, attn_implementation=attn_implementation)
    tiny.sharpen(model, seed=sum(map(ord, model_type)))
    return model.eval()


def config(model_type: str, vocab_size: int, num_positions: int, **changes: Any) -> PretrainedConfig:
    """The config that `build` builds from: of a whole model, be it that a part of it is built."""
    config_class = CONFIG_MAPPING[model_type]
    settings = _merged(_shrunk(config_class(), vocab_size, num_positions), _BESIDE.get(model_type, {}))
    return config_class(**_merged(settings, changes))


def _shrunk(config: PretrainedConfig, vocab_size: int, num_positions: int) -> dict[str, Any]:
    """The arguments that make a small config of this kind."""
    changes: dict[str, Any] = {}
    own = config.to_dict()
    for name, value in own.items():
        if isinstance(value, int) and not isinstance(value, bool):
            changes[name] = vocab_size if re.fullmatch(_VOCABULARY, name) else _small(name, value)
        if re.fullmatch(_POSITIONS, name) and value:
            changes[name] = num_positions
        if re.fullmatch(r"(pad|bos|eos|decoder_start|sep|cls)_token_id", name) and value is not None:
            changes[name] = {"pad_token_id": tiny.PAD, "bos_token_id": 1}.get(name, 2)
        elif re.fullmatch(r"\w+_token_(id|index)|\w+_index|\w+_token", name) and isinstance(value, int):
            first = vocab_size - NUM_SPECIAL
            changes[name] = value if value < first else first + sum(map(ord, name)) % NUM_SPECIAL
    if "qk_rope_head_dim" in changes and "qk_nope_head_dim" in changes:
        changes["head_dim"] = changes["qk_rope_head_dim"]
        changes["num_key_value_heads"] = changes["num_attention_heads"]
        changes["qk_head_dim"] = changes["qk_rope_head_dim"] + changes["qk_nope_head_dim"]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(name), dict) and "mrope_section" in own[name]:
            changes[name] = _small_sections(own[name], changes.get("head_dim") or 16)
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            changes[name] = {"model_type": part.model_type, **_shrunk(part, vocab_size, num_positions)}
    return changes


def _small(name: str, value: int) -> int:
    fitting = [size for pattern, size in _SIZES if re.fullmatch(pattern, name)]
    return min(value, fitting[-1]) if fitting else value


def _small_sections(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary settings whose parts for time, height and width fill a small head."""
    half = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
    rest = (half - half // 4) // 2
    return {**rope, "mrope_section": [half - 2 * rest, rest, rest]}


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        merged[name] = _merged(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged
