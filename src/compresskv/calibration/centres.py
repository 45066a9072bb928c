"""Measuring where the queries of each head lie before they are turned to their positions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.plain import AttentionFunction
from compresskv.cache.full import FullCache
from compresskv.cache.routed import RoutedLayer
from compresskv.models.decoding import prefill
from compresskv.models.place import input_device
from compresskv.models.rotary import Rotations
from compresskv.models.shape import decoder_config
from compresskv.profiles.packing import packed
from compresskv.selection.centres import CentreSums
from compresskv.system.progress import Progress


class _Layer(RoutedLayer):
    """Keeps everything, and counts all queries that come by. Batches of one prompt."""

    def __init__(self, layer_idx: int, model: PreTrainedModel, rotations: Rotations, sums: CentreSums) -> None:
        super().__init__(layer_idx, decoder_config(model))
        self._rotations, self._sums = rotations, sums

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention."""
        num_seen = self.stored()[0].shape[2]
        rotation = self._rotations.of(self.layer_idx, num_seen, query.device)
        queries = query[0].float()
        if rotation is not None:
            positions = torch.arange(num_seen - query.shape[2], num_seen, device=query.device)
            queries = rotation.undone(queries, positions)
        self._sums.add(queries, rotation)
        return super().attend(attention, query, mask, **kwargs)


@torch.no_grad()
def find_centres(model: PreTrainedModel, prompts: Sequence[Sequence[int]], on_progress: Progress) -> tuple[str, ...]:
    """Read each prompt, and take the means of each head's queries; inside `routing`.

    Returns: for `Profile.query_centres`.
    Source: TriAttention (arXiv 2604.04921), section 4. Differs: the prompts are those of the other measurements.
    """
    rotations, sums = Rotations(model), dict[int, CentreSums]()
    for done, token_ids in enumerate(prompts, start=1):
        cache = FullCache(
            model,
            lambda layer_idx, _: _Layer(layer_idx, model, rotations, sums.setdefault(layer_idx, CentreSums())),
        )
        prefill(model, torch.tensor([token_ids], device=input_device(model)), cache)
        on_progress("where queries lie", done / len(prompts))
    return tuple(
        packed(one.solve(rotations.of(layer_idx, 1, torch.device("cpu"))).flatten().tolist(), 16)
        for layer_idx, one in sorted(sums.items())
    )
