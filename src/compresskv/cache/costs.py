"""What tokens take in a model's cache, for budgets in bytes."""

from transformers import PreTrainedModel

from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.selection.budgets import SharedBudget, resolve_shared
from compresskv.selection.byte_budget import Costs
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision, find_precision


def costs_of(model: PreTrainedModel, precision: Precision) -> Costs:
    """What tokens take in the layers that are compressed."""
    config, itemsize = decoder_config(model), model.dtype.itemsize
    heads = [heads_of(config, layer_idx) for layer_idx in compressible_layers(model)]

    def nbytes(one: Precision) -> int:
        return sum(own.num_kv_heads * one.nbytes(own.head_dim, itemsize) for own in heads)

    fixed = sum(own.num_kv_heads * precision.fixed_nbytes(own.head_dim, itemsize) for own in heads)
    return Costs(full=nbytes(PRECISIONS[NATIVE]), held=nbytes(precision), fixed=fixed, store=precision.name)


def tokens_kept(model: PreTrainedModel, budget: SharedBudget, num_tokens: int, store: str = NATIVE) -> int:
    """Tokens that a budget, which no prompt decides, keeps of a prompt in a store.

    Raises:
        ConfigError: no token fits into its bytes.
    """
    costs = costs_of(model, find_precision(store)) if isinstance(budget, str) else None
    return resolve_shared(budget, num_tokens, costs)
