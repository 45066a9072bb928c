"""What the layers of one cache decide together: budgets, the prompt's shape, and when each layer is cut."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from compresskv.cache.auto import Automatic, automatic, observed_attention
from compresskv.cache.conditions import Conditions
from compresskv.cache.group import Group, one_batch
from compresskv.errors import PromptError
from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.selection.auto_budget import LEAST_TOKENS, AutoChoice
from compresskv.selection.budgets import Budget, SharedBudget, check_budget, is_shared, resolve, resolve_shared
from compresskv.selection.cuts import ChunkStats, Cut, chunk_stats, prompt_cuts
from compresskv.selection.select import EMPTY_SLOT


class Retaining(Protocol):
    """A cache layer as the eviction sees it."""

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Keep the named prompt tokens and free all others. `scores` (B, H or 1, T) are what they were chosen by."""

    def hold(self, tokens: Tensor) -> None:
        """Free all others, and wait for `retain`, which names some of these."""


class Eviction:
    """What the layers of one cache share: the method, the budget, and the prompt's shape once it is known."""

    def __init__(self, method: Method, budget: Budget, conditions: Conditions) -> None:
        """Nothing is read yet.

        Raises:
            ConfigError: the budget cannot work.
        """
        self.method = method
        self.budget = 1 if method.brings_budget else check_budget(budget, conditions.num_layers)
        self.conditions = conditions
        self._auto = automatic(method, self.budget, cuts_early=conditions.chunks is not None)
        self.num_later = 0
        """Tokens of the prompt behind the chunk that is read now."""
        self.awaits_end = False
        """Whether layers wait with the cut behind it: the prompt's end is to be read before."""
        self.num_candidates: list[int] = []
        """Tokens that each layer held which freed the rest of the prompt while it waited for later ones."""
        self.foresees = True
        """Whether the method could tell what such layers would hardly keep."""
        self.choices: list[AutoChoice] = []
        """What was chosen for each row of the prompt, where each prompt decides its budget."""
        self.reset()

    def reset(self) -> None:
        """Forget the last prompt."""
        self._cuts: dict[int, dict[int, Cut]] = {}
        self._head_budgets: dict[tuple[int, int], list[list[int]]] = {}
        self._row_lengths: list[int] | None = None
        self._groups: list[Group] = []
        self._waiting: list[tuple[Retaining, torch.device, tuple[int, int]]] = []
        self.choices, self.num_candidates, self.foresees = [], [], True

    def cuts(self, num_prompt: int) -> dict[int, Cut]:
        """The cuts before a prompt's end, by the tokens that were read then."""
        chunks = self.conditions.chunks
        if chunks is None:
            return {}
        if num_prompt not in self._cuts:
            cuts = prompt_cuts(num_prompt, self._num_kept(num_prompt), self.method.window_size, chunks)
            self._cuts[num_prompt] = {cut.num_read: cut for cut in cuts if cut.num_read < num_prompt}
        return self._cuts[num_prompt]

    def chunk_stats(self, num_prompt: int) -> ChunkStats | None:
        """What these cuts do to a prompt; None where none are asked for."""
        chunks = self.conditions.chunks
        if chunks is None:
            return None
        return chunk_stats(num_prompt, self._num_kept(num_prompt), [*self.cuts(num_prompt).values()], chunks)

    def _num_kept(self, num_prompt: int) -> int:
        """Tokens of the fullest KV head in the end."""
        return max(max(counts) for counts in self._budgets(num_prompt, num_prompt))

    def end_of_prompt(
        self, layer: Retaining, position: int, inputs: LayerInputs, *, num_evicted: int = 0, cut: Cut | None = None
    ) -> None:
        """Cut the layer, now or, where the method decides for all layers together, when the last one has come.

        Args:
            inputs: of what the layer holds.
            num_evicted: the prompt's tokens that earlier cuts evicted.
            cut: one before the prompt's end, which leaves as many tokens in all KV heads; None: its end.
        """
        with self.conditions.observer.evicting():
            self._end_of_prompt(layer, position, inputs, num_evicted, cut)

    def _end_of_prompt(
        self, layer: Retaining, position: int, inputs: LayerInputs, num_evicted: int, cut: Cut | None
    ) -> None:
        if position == 0:  # caches that branched off before the end of the prompt share this
            self.reset()
        row_lengths = self._note_rows(inputs)
        if min(row_lengths) == inputs.keys.shape[2]:
            inputs = replace(inputs, valid=None)
        if position == 0:
            self._groups = self._grouped(row_lengths, inputs.num_ahead, num_evicted, cut)
        if not self._groups:
            if self._auto is not None:
                self.choices = [self._auto.keeping_all(length) for length in row_lengths]
            self._keep_all(layer, row_lengths, inputs)
            return
        own = [inputs if len(self._groups) == 1 else inputs.of_rows(group.rows) for group in self._groups]
        own = [one.with_window(group.method.num_observed()) for one, group in zip(own, self._groups, strict=True)]
        if self.method.decides_together:
            self._waiting.append((layer, inputs.keys.device, (inputs.keys.shape[1], inputs.keys.shape[2])))
            for group, rows in zip(self._groups, own, strict=True):
                with self.conditions.observer.scoring_tokens():
                    observed = group.method.observe(rows)
                # Layers may lie on several devices. What they tell each other is small, and goes to the first one's.
                group.observed.append(observed.to(self._waiting[0][1]))
                if self._auto is not None:
                    group.attention.append(observed_attention(rows).to(self._waiting[0][1]))
            if len(self._waiting) == self.conditions.num_layers:
                self._decide()
            else:
                self._hold_candidates(layer, inputs)
        else:
            scores = []
            for group, rows in zip(self._groups, own, strict=True):
                with self.conditions.observer.scoring_tokens():
                    scores.append(group.checked(group.method.score(rows), *inputs.keys.shape[1:3]))
            self._retain(layer, position, scores)

    def _keep_all(self, layer: Retaining, row_lengths: list[int], inputs: LayerInputs) -> None:
        """Evict nothing; what is to be packed is kept token by token all the same."""
        if self.conditions.precision.is_packed:
            num_tokens = inputs.keys.shape[2]
            tokens = torch.arange(num_tokens, device=inputs.keys.device).expand(len(row_lengths), 1, -1)
            if inputs.valid is not None:
                tokens = tokens.masked_fill(~inputs.valid[:, None], EMPTY_SLOT)
            layer.retain(tokens)

    def _hold_candidates(self, layer: Retaining, inputs: LayerInputs) -> None:
        """Let a layer that waits for later ones free what it will hardly keep, where that is most of the prompt."""
        candidates = self.conditions.candidates
        if candidates is None or self.conditions.chunks is not None or self._auto is not None:
            return  # chunks are few tokens; how many of all are kept, the end alone tells
        if not any(group.has_spare(candidates) for group in self._groups):
            return
        with self.conditions.observer.scoring_tokens():
            chosen = [group.nominated(candidates) for group in self._groups]
        known = [own for own in chosen if own is not None]
        self.foresees = len(known) == len(chosen)
        if self.foresees:
            tokens = one_batch(known, [group.rows for group in self._groups])
            self.num_candidates.append(tokens.shape[2])
            layer.hold(tokens.to(inputs.keys.device))

    def _decide(self) -> None:
        """Cut all layers that wait."""
        shared = is_shared(self.budget)  # what the caller gives for each layer is not shared out again
        with self.conditions.observer.scoring_tokens():
            if self._auto is not None:
                self._choose(self._auto)
            by_group = [group.decided(shared=shared) for group in self._groups]
        waiting, self._waiting = self._waiting, []
        for position, ((layer, device, shape), *found) in enumerate(zip(waiting, *by_group, strict=True)):
            scores = [group.checked(own, *shape) for group, own in zip(self._groups, found, strict=True)]
            self._retain(layer, position, [own.to(device) for own in scores])

    def _choose(self, auto: Automatic) -> None:
        """Let each row decide its budget."""
        chosen: dict[int, AutoChoice] = {}
        for group in self._groups:
            most = [self._in_tokens(auto.ceiling, length) for length in group.lengths]
            choices = auto.choose(group.method, group.observed, group.attention, most, group.lengths)
            group.budgets = [[[choice.tokens]] * self.conditions.num_layers for choice in choices]
            group.attention = []
            chosen.update(zip(group.rows, choices, strict=True))
        self.choices = [chosen[row] for row in sorted(chosen)]

    def _retain(self, layer: Retaining, position: int, scores: list[Tensor]) -> None:
        """Cut one layer by the scores of each group's rows."""
        if all(group.keeps_all_of(position) for group in self._groups) and not self.conditions.precision.is_packed:
            return
        chosen = [group.selected(position, own) for group, own in zip(self._groups, scores, strict=True)]
        rows = [group.rows for group in self._groups]
        told = [group.told(own) for group, own in zip(self._groups, scores, strict=True)]
        layer.retain(one_batch(chosen, rows), one_batch(told, rows))

    def _grouped(self, row_lengths: list[int], num_ahead: int, num_evicted: int, cut: Cut | None) -> list[Group]:
        """Rows whose budgets ask for the same window belong together; none where nothing is to be evicted."""
        groups: dict[int, Group] = {}
        for row, length in enumerate(row_lengths):
            num_held = length - num_ahead
            if cut is None:
                budgets = self._budgets(num_held + num_evicted, num_held)
            else:
                budgets = [[cut.num_kept]] * self.conditions.num_layers
            counts = [count for layer in budgets for count in layer]
            window_size = self.method.window_at(sum(counts) // len(counts))
            if window_size not in groups:
                method = self.method.with_window(window_size + num_ahead)
                groups[window_size] = Group(method, evenly=cut is not None)
            group = groups[window_size]
            group.rows.append(row)
            group.lengths.append(length)
            group.budgets.append([[count + num_ahead for count in layer] for layer in budgets])
        return [] if all(group.keeps_all for group in groups.values()) else list(groups.values())

    def _budgets(self, num_prompt: int, num_held: int) -> list[list[int]]:
        """What each layer retains of a prompt of which it holds so many tokens: one number, or one for each KV head."""
        if (num_prompt, num_held) not in self._head_budgets:
            budget = self.budget
            if self._auto is not None:  # the least that may be kept: what is, the prompt will tell
                budget = min(LEAST_TOKENS, self._in_tokens(self._auto.ceiling, num_prompt))
            elif isinstance(budget, str):
                budget = self._in_tokens(budget, num_prompt)
            if isinstance(budget, float) and num_held < num_prompt:
                budget = resolve(budget, num_prompt)
            per_layer = self.method.resolve_budgets(budget, self.conditions.num_layers, num_held)
            self._head_budgets[num_prompt, num_held] = per_layer
        return self._head_budgets[num_prompt, num_held]

    def _in_tokens(self, budget: SharedBudget, num_prompt: int) -> int:
        """What a prompt keeps at a shared budget."""
        return resolve_shared(budget, num_prompt, self.conditions.costs)

    def _note_rows(self, inputs: LayerInputs) -> list[int]:
        """The number of tokens in each row that are no padding: read from the device once a prompt.

        Raises:
            PromptError: a row's padding is not all at its left.
        """
        if self._row_lengths is None:
            batch_size, _, num_tokens, _ = inputs.keys.shape
            valid = inputs.valid
            if valid is None:
                self._row_lengths = [num_tokens] * batch_size
            else:
                lengths = valid.sum(dim=-1)
                expected = torch.arange(num_tokens, device=valid.device) >= num_tokens - lengths[:, None]
                if not torch.equal(valid, expected) or not bool(lengths.all()):
                    raise PromptError("the attention mask has padding inside or right of a prompt: pad on the left")
                self._row_lengths = lengths.tolist()
        return self._row_lengths
