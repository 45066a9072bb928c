"""What a model's config says of its decoder: where it stands, and which of its layers attend to the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def decoder_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that the decoder's attention modules read: the text part of a multimodal model's."""
    return model.config.get_text_config(decoder=True)


@dataclass(frozen=True)
class Heads:
    """The attention heads of one layer."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int


def heads_of(config: PretrainedConfig, layer_idx: int) -> Heads:
    """Of one layer of a decoder with this config: they may differ between layers, as in Gemma 4."""
    by_layer = getattr(config, "per_layer_config", None)  # transformers before 5.6 have none
    own = config if by_layer is None else by_layer[layer_idx]
    num_query_heads = own.num_attention_heads
    return Heads(
        num_query_heads,
        getattr(own, "num_key_value_heads", None) or num_query_heads,
        getattr(own, "head_dim", None) or own.hidden_size // num_query_heads,
    )


def shares_keys(config: PretrainedConfig) -> bool:
    """Whether some layers of a decoder with this config attend to the keys of others, as in Gemma 3n."""
    return bool(getattr(config, "num_kv_shared_layers", 0))


def full_attention_layers(config: PretrainedConfig) -> list[int]:
    """The numbers of the layers that attend to the whole prompt, in a decoder with this config."""
    from transformers.cache_utils import DynamicLayer

    return [layer_idx for layer_idx, kind in enumerate(_layer_kinds(config)) if kind is DynamicLayer]


def _layer_kinds(config: PretrainedConfig) -> list[type]:
    from transformers.cache_utils import DynamicCache

    return [type(layer) for layer in DynamicCache(config=config).layers]


def compressible_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the model's full-attention layers.

    Raises:
        ModelError: there is none.
    """
    config = decoder_config(model)
    indices = full_attention_layers(config)
    if not indices:
        both = any("AndFullAttention" in kind.__name__ for kind in _layer_kinds(config))
        problem = "only such as are linear attention as well" if both else "so there is nothing to compress"
        raise ModelError(f"{type(model).__name__} has no full-attention layer, {problem}")
    return indices
