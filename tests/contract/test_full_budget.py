"""What compression must never change: everything at a budget of the whole prompt, and the first token at any budget."""

import pytest
import torch

import compresskv
import tiny
from compresskv.selection.budgets import Budget

NUM_PROMPT = 80


@pytest.mark.parametrize("budget", [NUM_PROMPT, NUM_PROMPT + 7, 1.0], ids=["exactly", "above", "fraction"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_budget_of_the_whole_prompt_changes_no_token(
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        tokens = tiny.generate(model, prompt, cache)
    assert tokens.tolist() == tiny.generate(model, prompt).tolist()
    assert all(layer.positions is None for layer in cache.compressed_layers)


# Evicting before the last layer has attended would show here.
@pytest.mark.parametrize("budget", [1, 5, 24, 0.4])
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_first_token_is_that_of_the_full_cache_at_any_budget(
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        logits = tiny.read(model, cache, prompt, [NUM_PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(prompt).logits, atol=1e-5, rtol=0)
    assert all(layer.num_retained < NUM_PROMPT for layer in cache.compressed_layers)
