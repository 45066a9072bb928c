"""Each row of a left-padded batch is treated as if it were alone."""

import math

import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv import CompressedCache
from compresskv.cache.layer import CompressedLayer
from compresskv.selection.budgets import Budget
from compresskv.selection.select import EMPTY_SLOT

# One row as long as the batch, one shorter than its budget and the window.
LENGTHS = [110, 57, 30, 20, 6]
BUDGETS = [24, 0.4, 0.55, 0.85, 200]


def run(
    family: str,
    attn_implementation: str,
    method: str,
    budget: Budget,
    prompt: Tensor,
    mask: Tensor,
    store: str = "native",
) -> tuple[Tensor, CompressedCache]:
    model = tiny.tiny_model(family, attn_implementation)
    with compresskv.compressing(model, method, budget, store=store, **tiny.options_for(model, method)) as cache:
        return tiny.generate(model, prompt, cache, attention_mask=mask), cache


def kept_of_row(layer: CompressedLayer, row: int, length: int) -> list[list[int]]:
    """For each KV head, the tokens that a row keeps, counted from its first token that is no padding."""
    start = layer.num_prompt_tokens - length
    kept = [[token - start for token in head] for head in tiny.kept_tokens(layer)[row]]
    if layer.positions is None:  # nothing was cut, padding neither
        return [head[start:] for head in kept]
    return kept


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_each_row_keeps_and_generates_what_it_does_alone(
    family: str, store: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    rows = [tiny.random_tokens(length, seed=length) for length in LENGTHS]
    tokens, together = run(family, attn_implementation, method, budget, *tiny.left_padded(rows), store)
    for i, row in enumerate(rows):
        tokens_alone, alone = run(family, attn_implementation, method, budget, row, torch.ones_like(row), store)
        for in_batch, own in zip(together.compressed_layers, alone.compressed_layers, strict=True):
            kept = kept_of_row(in_batch, i, LENGTHS[i])
            assert kept == tiny.kept_tokens(own)[0], f"row {i}, layer {in_batch.layer_idx}"
        assert tokens[i].tolist() == tokens_alone[0].tolist(), f"row {i}"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
def test_no_padding_is_kept_and_unused_slots_come_first(method: str, budget: Budget) -> None:
    prompt, mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in LENGTHS])
    _, cache = run("llama", "sdpa", method, budget, prompt, mask)
    for layer in cache.compressed_layers:
        if layer.positions is None:
            continue
        used = layer.positions != EMPTY_SLOT
        rows, heads, slots = used.nonzero(as_tuple=True)
        assert mask[rows, layer.positions[rows, heads, slots]].all(), "a padding token is retained"
        assert used.all(dim=-1).any(), "no more slots than the head that keeps the most needs"
        assert (used.int().diff(dim=-1) >= 0).all(), "unused slots come before all used ones"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
def test_each_rows_counts_sum_to_its_own_budget(method: str, budget: Budget) -> None:
    prompt, mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in LENGTHS])
    _, cache = run("llama", "sdpa", method, budget, prompt, mask)
    for row, length in enumerate(LENGTHS):
        counts = [len(head) for layer in cache.compressed_layers for head in kept_of_row(layer, row, length)]
        mean = min(budget, length) if isinstance(budget, int) else math.floor(budget * length + 0.5)
        assert sum(counts) == mean * len(counts)
        assert max(counts) <= length


# Padding to a multiple of some number pads every row; "full" has no scores to evict that padding by.
@pytest.mark.parametrize("budget", [24, 200])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_batch_may_be_padded_beyond_its_longest_row(method: str, budget: Budget) -> None:
    rows = [tiny.random_tokens(length, seed=length) for length in (60, 31)]
    prompt, mask = tiny.left_padded(rows)
    wider, wider_mask = (torch.nn.functional.pad(tensor, (4, 0)) for tensor in (prompt, mask))
    tokens, _ = run("llama", "sdpa", method, budget, prompt, mask)
    tokens_of_wider, _ = run("llama", "sdpa", method, budget, wider, wider_mask)
    assert tokens_of_wider.tolist() == tokens.tolist()


def test_the_order_of_rows_does_not_matter() -> None:
    # The longest row need not be the first.
    rows = [tiny.random_tokens(length, seed=length) for length in LENGTHS]
    there, _ = run("llama", "sdpa", "snapkv", 0.4, *tiny.left_padded(rows))
    back, _ = run("llama", "sdpa", "snapkv", 0.4, *tiny.left_padded(rows[::-1]))
    assert back.flip(0).tolist() == there.tolist()
