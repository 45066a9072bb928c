"""One decode step, tensors in and tensors out: what a compiler takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from compresskv.attention.masks import without_masks
from compresskv.cache.stores.base import EVEN, RAGGED
from compresskv.cache.stores.packed_vectors import rotation
from compresskv.compiled.packed import PackedLayer
from compresskv.compiled.step_layer import EvenLayer, RaggedLayer, StepLayer
from compresskv.models.arguments import cache_argument
from compresskv.models.shape import decoder_config, heads_of
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision

SLIDING = "sliding"
"""A kind of layer, beside KV heads that hold equal numbers of tokens, `EVEN`, and such that need not, `RAGGED`. Of what
is packed, the precision follows: 'even:int8'."""


@dataclass(frozen=True)
class StepInputs:
    """What one step reads, beside the weights. One sequence.

    For an even layer keys and values are (1, H_kv, n, D), with room behind the tokens held. For a ragged one they are
    (1, N, D), in which each KV head has a part. For a sliding one they are the tokens held, (1, H_kv, n, D). For a
    packed one they are what lies beside it, first and new tokens, as of an even layer.
    """

    token: Tensor
    """(1, 1) int64."""
    position: Tensor
    """(1, 1) int64: how many tokens were seen before."""
    starts: Tensor
    """(layers, H_kv) int64, where each KV head's part begins; of even layers only the differences to `ends` count."""
    ends: Tensor
    """(layers, H_kv) int64, where its new token goes."""
    keys: list[Tensor]
    values: list[Tensor]
    packed: list[list[Tensor]]
    """Of each layer, what is packed; nothing where nothing is. See `PackedLayer`."""

    def as_args(self) -> tuple[Any, ...]:
        """In the order of `Step.forward`."""
        return self.token, self.position, self.starts, self.ends, self.keys, self.values, self.packed


class Step(nn.Module):
    """A model that reads one token with what its cache layers hold."""

    def __init__(
        self, model: PreTrainedModel, kinds: tuple[str, ...], narrow: Mapping[str, Tensor] | None = None
    ) -> None:
        """A step of a model.

        Args:
            kinds: of its layers.
            narrow: float32 weights that are read in 16 bits and widened, by their names in the model.
        """
        super().__init__()
        self.model = model
        self._kinds = kinds
        self._narrow = narrow_names(narrow or {})
        for layer_idx in (at for at, kind in enumerate(kinds) if precision_of(kind).is_packed):
            rotation(heads_of(decoder_config(model), layer_idx).head_dim, model.device)  # not made while it is traced
        for own, name in self._narrow.items():
            self.register_buffer(own, (narrow or {})[name])

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        starts: Tensor,
        ends: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        packed: list[list[Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Write the token's keys and values into even and ragged layers.

        Returns: the next token's logits (1, vocab); the keys and values of sliding layers, the new token's included.
        """
        config = decoder_config(self.model)
        layers: list[Any] = []
        for layer_idx, kind in enumerate(self._kinds):
            held = keys[layer_idx], values[layer_idx]
            if kind == SLIDING:
                layers.append(_sliding_layer(*held))
                continue
            given = (layer_idx, config, *held, starts[layer_idx], ends[layer_idx])
            if (precision := precision_of(kind)).is_packed:
                layers.append(PackedLayer(*given, packed=packed[layer_idx], precision=precision))
            else:
                layers.append((EvenLayer if kind == EVEN else RaggedLayer)(*given))
        widened = {name: getattr(self, own).float() for own, name in self._narrow.items()}
        cache = Cache(layers=layers)
        inputs = {"input_ids": token, "position_ids": position, cache_argument(self.model): cache, "use_cache": True}
        with without_masks():
            output = functional_call(self.model, widened, kwargs=inputs) if widened else self.model(**inputs)
        sliding = [layer for layer in layers if not isinstance(layer, StepLayer)]
        return output.logits[:, -1], [states for layer in sliding for states in (layer.keys, layer.values)]


def is_ragged(kind: str) -> bool:
    """Whether KV heads of such a layer may hold different numbers of tokens."""
    return kind.partition(":")[0] == RAGGED


def precision_of(kind: str) -> Precision:
    """In which a layer of that kind holds what was kept of a prompt."""
    return PRECISIONS[kind.partition(":")[2] or NATIVE]


def narrow_names(narrow: Iterable[str]) -> dict[str, str]:
    """Under which name `Step` has each narrow weight."""
    return {f"narrow_{place}": name for place, name in enumerate(narrow)}


def _sliding_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Attends to all that it holds and to the new token; the caller drops what has left the window."""
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.device = keys.device
    layer.dtype = keys.dtype  # type: ignore[attr-defined, unused-ignore]  # transformers before 5.24 ask for it
    return layer
