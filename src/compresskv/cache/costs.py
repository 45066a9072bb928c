"""What tokens take in a model's cache, for budgets in bytes."""

from transformers import PreTrainedModel

from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.selection.byte_budget import Costs
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision


def costs_of(model: PreTrainedModel, precision: Precision) -> Costs:
    """What tokens take in the layers that are compressed."""
    config, itemsize = decoder_config(model), model.dtype.itemsize
    heads = [heads_of(config, layer_idx) for layer_idx in compressible_layers(model)]

    def nbytes(one: Precision) -> int:
        return sum(own.num_kv_heads * one.nbytes(own.head_dim, itemsize) for own in heads)

    fixed = sum(own.num_kv_heads * 2 * own.head_dim for own in heads) * precision.fixed_vectors
    return Costs(full=nbytes(PRECISIONS[NATIVE]), held=nbytes(precision), fixed=fixed)
