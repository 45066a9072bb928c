"""Where a model's positions end."""

from torch import nn
from transformers import PreTrainedModel

from compresskv.models.shape import decoder_config

_MOST_OFFSET = 8
"""Rows that tables of positions may have beside those of positions: OPT's has 2."""


def last_learned(model: PreTrainedModel) -> int | None:
    """How many positions the model can compute at all: as many as its table has; None where it has no such table."""
    limit = getattr(decoder_config(model), "max_position_embeddings", None)
    if limit is None:
        return None
    words = model.get_input_embeddings()
    tables = (one for one in model.modules() if isinstance(one, nn.Embedding) and one is not words)
    return limit if any(limit <= one.num_embeddings <= limit + _MOST_OFFSET for one in tables) else None
