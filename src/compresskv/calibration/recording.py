"""Cache layers that keep the whole cache and measure the attention over it. Batches of one prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskv.attention.plain import AttentionFunction, scaling_of
from compresskv.cache.routed import RoutedLayer
from compresskv.errors import ModelError
from compresskv.methods.inputs import LayerInputs
from compresskv.models.shape import decoder_config
from compresskv.selection.scores import window_attention
from compresskv.selection.select import select

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_EPSILON = 1e-6


class SpanLayer(RoutedLayer):
    """Records, for the last query of each forward pass, the attention mass on a span and the arg-max.

    Only one attention row a head is formed at a time: (H_q, T) floats.
    """

    span: slice | None = None
    """Where to look; None records nothing."""

    def start(self, span: slice) -> None:
        """Begin a run."""
        self.span = span
        self.mass: list[Tensor] = []
        self.peaks: list[Tensor] = []

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention, recorded."""
        output, weights = super().attend(attention, query, mask, **kwargs)
        if self.span is not None:
            scaling = scaling_of(query, kwargs.get("scaling"))
            keys, _ = self.stored()
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            rows = window_attention(query[:, :, -1:], keys, scaling=scaling, softcap=softcap, sinks=sinks)[0, :, 0]
            self.mass.append(rows[:, self.span].sum(dim=-1))  # (H_q,)
            self.peaks.append(rows.argmax(dim=-1))
        return output, weights


class MaskedLayer(RoutedLayer):
    """Sets the output of some query heads to zero, other heads in each row of the batch."""

    kept_heads: Tensor | None = None
    """(B, H_q), 1 for a head that works and 0 for one that is masked; None masks nothing."""

    def mask_heads(self, rows: Sequence[Sequence[int]], num_heads: int) -> None:
        """Mask the named heads in each row."""
        kept = torch.ones(len(rows), num_heads, dtype=self.dtype, device=self.device)
        for row, heads in enumerate(rows):
            kept[row, list(heads)] = 0
        self.kept_heads = kept

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention; the outputs of masked heads are zero."""
        output, weights = super().attend(attention, query, mask, **kwargs)  # (B, T_new, H_q, D)
        return (output if self.kept_heads is None else output * self.kept_heads[:, None, :, None]), weights


class CutLayer(RoutedLayer):
    """Compares, at each decode step, the attention block's output under a cut cache with the full one's.

    The query is the full run's. Source: CompressKV (arXiv 2508.02401), section 3.3, eqs. 6-8.
    """

    def __init__(
        self,
        layer_idx: int,
        model: PreTrainedModel,
        score: Callable[[LayerInputs], Tensor],
        window_size: int,
        budget: int,
    ) -> None:
        super().__init__(layer_idx, decoder_config(model))
        self._score = score
        self._window_size = window_size
        self._budget = budget
        self.num_prompt_tokens: int | None = None
        """Set before the pass that ends the prompt: from then on its tokens are cut."""
        self._kept: Tensor | None = None
        self.errors: list[float] = []

    def start(self, num_prompt_tokens: int) -> None:
        """Begin a run whose prompt has that many tokens."""
        self.num_prompt_tokens = num_prompt_tokens
        self._kept = None
        self.errors = []

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the full cache; beside it, in decode, over the cut one."""
        output, weights = super().attend(attention, query, mask, **kwargs)
        if self.num_prompt_tokens is None:
            return output, weights
        keys, values = self.stored()
        if self._kept is None:
            scaling = scaling_of(query, kwargs.get("scaling"))
            window = query[:, :, -self._window_size :]
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            inputs = LayerInputs(self.layer_idx, window, keys, values, scaling, softcap, sinks=sinks)
            self._kept = select(self._score(inputs), self._budget, self._window_size)[0, 0]
        else:
            new = torch.arange(self.num_prompt_tokens, keys.shape[2], device=keys.device)
            kept = torch.cat([self._kept, new])
            cut, _ = attention(query, keys[:, :, kept], values[:, :, kept], None)
            self.errors.append(_relative_error(_output_projection(kwargs["module"]), cut, output))
        return output, weights


def _relative_error(projection: nn.Module, cut: Tensor, full: Tensor) -> float:
    """||O_cut - O_full|| / (||O_full|| + 1e-6), Frobenius, after the output projection."""
    outputs = [projection(states.flatten(2)).float() for states in (cut, full)]
    return float((outputs[0] - outputs[1]).norm() / (outputs[1].norm() + _EPSILON))


def _output_projection(module: nn.Module) -> nn.Module:
    for name in _OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module):
            return projection
    raise ModelError(f"{type(module).__name__} has no output projection named {', '.join(_OUTPUT_PROJECTIONS)}")
