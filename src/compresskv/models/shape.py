"""What a model's config says of its decoder: where it stands, and which of its layers attend to the whole prompt."""

from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from compresskv.errors import ModelError


def decoder_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that the decoder's attention modules read: the text part of a multimodal model's."""
    return model.config.get_text_config(decoder=True)


def compressible_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the model's full-attention layers.

    Raises:
        ModelError: there is none.
    """
    layers = DynamicCache(config=decoder_config(model)).layers
    indices = [layer_idx for layer_idx, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not indices:
        raise ModelError(f"{type(model).__name__} has no full-attention layer, so there is nothing to compress")
    return indices
