"""The attention of whole prompts in bfloat16, beside PyTorch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compresskv
import tiny
from compresskv.attention import prefill as prompt_attention
from compresskv.attention.prefill import causal_attention, is_faster, later_attention
from compresskv.attention.routing import routing
from compresskv.plans.capture import CapturedPrompt


def states(num_heads: int, num_tokens: int, seed: int, batch_size: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_heads, num_tokens, 16, generator=generator).bfloat16()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.sampled_from([1, 3]), st.integers(1, 2), st.sampled_from([None, 0.3]))
def test_it_is_causal_attention(num_tokens: int, groups: int, batch_size: int, scaling: float | None) -> None:
    query = states(2 * groups, num_tokens, 1, batch_size)
    keys, values = (states(2, num_tokens, seed, batch_size) for seed in (2, 3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), is_causal=True, scale=scaling, enable_gqa=True
    )
    found = causal_attention(query, keys, values, scaling).double().transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)


def test_a_small_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = (states(2, 100, seed) for seed in (1, 2, 3))
    whole = causal_attention(query, keys, values, None)
    monkeypatch.setattr(prompt_attention, "_CHUNK_NBYTES", 1)
    torch.testing.assert_close(causal_attention(query, keys, values, None), whole, rtol=0.05, atol=0.02)


def test_what_it_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "_has_fast_bfloat16", lambda: True)
    long = states(2, 256, 1)
    assert is_faster(long, long)
    assert not is_faster(long.float(), long.float())  # float32 stays exact
    assert not is_faster(long[:, :, :255], long[:, :, :255])
    assert not is_faster(long[:, :, 100:], long)  # a later part of a prompt has a mask of its own
    assert not is_faster(long.requires_grad_(), long)


@pytest.mark.parametrize("takes_part", [True, False])
def test_a_prompt_read_by_a_model(monkeypatch: pytest.MonkeyPatch, takes_part: bool) -> None:
    monkeypatch.setattr(prompt_attention, "_has_fast_bfloat16", lambda: takes_part)
    model, prompt = tiny.tiny_model("llama", dtype=torch.bfloat16), tiny.random_tokens(300)
    with torch.no_grad():
        expected = model(prompt).logits
    with compresskv.compressing(model, "full") as cache:
        found = tiny.read(model, cache, prompt, [300])
    assert torch.equal(found, expected) != takes_part
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.08 * float(expected.abs().max()))


# What is measured against a full cache must be able to read both prompts by the same attention.
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_the_switch_reads_prompts_by_the_models_own_attention(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr(prompt_attention, "_has_fast_bfloat16", lambda: True)
    model, prompt = tiny.tiny_model("llama", dtype=torch.bfloat16), tiny.random_tokens(300)
    with torch.no_grad():
        expected = model(prompt).logits
    if by == "variable":
        monkeypatch.setenv("COMPRESSKV_EXACT_PREFILL", "1")
        with routing(model):
            assert torch.equal(CapturedPrompt(model, 8).read(prompt[0].tolist()), expected[0, -1])
        with compresskv.compressing(model, "full", exact_prefill=False) as cache:
            assert not torch.equal(tiny.read(model, cache, prompt, [300]), expected)
    with compresskv.compressing(model, "full", exact_prefill=True if by == "argument" else None) as cache:
        assert torch.equal(tiny.read(model, cache, prompt, [300]), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(0, 60), st.sampled_from([1, 3]), st.sampled_from([None, 0.3]))
def test_a_later_part_of_a_prompt(num_new: int, num_before: int, groups: int, scaling: float | None) -> None:
    query, keys, values = (
        states(heads, num_before + num_new, seed, 2).float() for heads, seed in ((2 * groups, 1), (2, 2), (2, 3))
    )
    whole = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_attention, "_MASK_NBYTES", 1)  # a few queries at a time
        found = later_attention(query[:, :, num_before:], keys, values, scaling)
        assert prompt_attention._takes_groups(query, keys, values)
        patch.setattr(prompt_attention, "_takes_groups", lambda *_: False)  # as on a GPU without flash attention
        in_turns = later_attention(query[:, :, num_before:], keys, values, scaling)
    torch.testing.assert_close(found.transpose(1, 2), whole[:, :, num_before:])
    torch.testing.assert_close(in_turns, found)
    found = causal_attention(query[:, :, num_before:].bfloat16(), keys.bfloat16(), values.bfloat16(), scaling)
    torch.testing.assert_close(found.float().transpose(1, 2), whole[:, :, num_before:], rtol=0.05, atol=0.03)
