"""Which token each slot of a layer's store holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskv.attention.prefill import causal_mask
from compresskv.cache.stores.masks import retained_mask
from compresskv.errors import CacheStateError
from compresskv.selection.select import EMPTY_SLOT


@dataclass(frozen=True)
class Positions:
    """The tokens that were chosen, then all that came later: positions count from the first token seen.

    A head whose rows keep different numbers begins with `EMPTY_SLOT`.
    """

    later: range
    """Stored by every KV head behind the chosen ones; all that is stored where nothing was chosen yet."""
    chosen: Tensor | None = None
    """(B, H, R) int32, ascending, H being 1 or the number of KV heads: held beside what a slot holds packed, which may
    be 72 bytes."""
    fullest: tuple[int, ...] = (0,)
    """For each of H heads, the chosen tokens of the row that has most: the slots that it needs for them."""
    has_empty_slots: bool = False
    """Whether some of those slots must be masked."""
    fewest: int = 0
    """Tokens that each row of each head has chosen at least, as far as that is known."""

    @property
    def num_seen(self) -> int:
        """Tokens that were read, evicted ones included."""
        return self.later.stop

    @property
    def floor(self) -> int:
        """The number of tokens below which it cannot be cropped: those among which was chosen."""
        return self.later.start

    def counts(self, num_heads: int) -> list[int]:
        """Slots of each KV head."""
        fullest = self.fullest if len(self.fullest) == num_heads else self.fullest * num_heads
        return [count + len(self.later) for count in fullest]

    def appended(self, num_new: int) -> "Positions":
        """With new tokens; without the last ones where the number is negative."""
        return replace(self, later=range(self.later.start, self.later.stop + num_new))

    def of_rows(self, function: Callable[[Tensor], Tensor]) -> "Positions":
        """With `function` applied to the rows."""
        return self if self.chosen is None else replace(self, chosen=function(self.chosen))

    def explicit(self, batch_size: int, device: torch.device) -> Tensor:
        """(B, H, n) int64, ascending: of every slot of the fullest head, and `EMPTY_SLOT` before those of others."""
        later = torch.arange(self.later.start, self.later.stop, device=device)
        if self.chosen is None:
            return later.expand(batch_size, 1, -1)
        return torch.cat([self.chosen.long(), later.expand(*self.chosen.shape[:2], -1)], dim=-1)

    def cut_mask(self, mask: Tensor | None, query: Tensor, head: int | None = None) -> Tensor | None:
        """The mask for what is stored, of one over all tokens seen.

        Args:
            mask: (B or 1, 1, T_new, seen), bool or additive; None where nothing is masked but the future.
            query: (B, H_q, T_new, D), of all KV heads or of one.
            head: the one.
        Returns: (B, 1 or H_q, T_new, stored); None where nothing is masked but the future: new tokens come last.
        """
        num_new = query.shape[2]
        if self.chosen is None or (mask is None and not self.has_empty_slots):
            return mask
        if mask is None:
            mask = causal_mask(num_new, self.num_seen, query.device)
        return retained_mask(mask, self._chosen_of(self.chosen, head).long(), self.floor, query.shape[1])

    def _chosen_of(self, chosen: Tensor, head: int | None) -> Tensor:
        """What one KV head has chosen, or all."""
        if head is None or len(self.fullest) == 1:
            return chosen
        return chosen[:, head : head + 1, chosen.shape[2] - self.fullest[head] :]

    def empty_slots(self, num_heads: int) -> list[Tensor | None]:
        """For each KV head (B,) slots with which it begins in each row and that hold nothing; None: there are none."""
        if self.chosen is None or not self.has_empty_slots:
            return [None] * num_heads
        heads = (self._chosen_of(self.chosen, head)[:, 0] for head in range(num_heads))
        return [(own == EMPTY_SLOT).sum(dim=-1) for own in heads]

    def choose(self, tokens: Tensor) -> "tuple[Positions, Tensor]":
        """Keep the named tokens alone. Waits for the device once.

        Args:
            tokens: (B, H, R) int64, ascending positions of tokens that are stored; `EMPTY_SLOT` begins what keeps
                fewer.
        Returns: what is kept, and the slots, in terms of `explicit`, that hold it now; any slot for `EMPTY_SLOT`.
        Raises:
            CacheStateError: a token is not stored.
        """
        used = tokens != EMPTY_SLOT
        numbers = used.sum(dim=-1).flatten()
        slots = tokens
        if self.chosen is None:
            stored = ((tokens < self.num_seen) | ~used).all()
        else:
            num_heads = max(tokens.shape[1], self.chosen.shape[1])
            held = self.explicit(len(tokens), tokens.device).expand(-1, num_heads, -1).contiguous()
            wanted = tokens.expand(-1, num_heads, -1).contiguous()
            slots = torch.searchsorted(held, wanted).clamp(max=held.shape[-1] - 1)
            stored = ((held.gather(-1, slots) == wanted) | (wanted == EMPTY_SLOT)).all()
        *counts, all_stored = torch.cat([numbers, stored[None].long()]).tolist()
        if not all_stored:
            raise CacheStateError("cannot retain tokens that were evicted before, or not read yet")
        by_row = [counts[start : start + tokens.shape[1]] for start in range(0, len(counts), tokens.shape[1])]
        fullest = tuple(map(max, zip(*by_row, strict=True)))
        has_empty_slots = any(row != list(fullest) for row in by_row)
        first = tokens.shape[2] - max(fullest)
        chosen = tokens[..., first:].to(torch.int32)
        later = range(self.num_seen, self.num_seen)
        return Positions(later, chosen, fullest, has_empty_slots, min(counts)), slots[..., first:]
