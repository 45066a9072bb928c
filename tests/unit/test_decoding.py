"""Reading a prompt and choosing its next token."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import planted
import tiny
from compresskv.models.decoding import decode, decode_rows, last_logits, prefill


@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_logits_are_the_models_own_from_a_dense_hidden_state(family: str, num_tokens: int) -> None:
    """A slice of all hidden states would cost the output embedding twenty times as much on a CPU."""
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(num_tokens, batch_size=2)
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    with torch.no_grad():
        expected = model(prompt).logits[:, -1]
    head = model.get_output_embeddings()
    hooks = len(head._forward_pre_hooks)
    # the first of the hooks sees what the model gives, the last what the embedding gets
    handle = head.register_forward_pre_hook(note)
    try:
        logits = last_logits(model, prompt, DynamicCache(config=model.config))
    finally:
        handle.remove()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(head._forward_pre_hooks) == hooks
    assert [state.shape[1] for state in seen] == [1]


def test_the_embedding_gets_a_tensor_of_its_own() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(30)
    head, seen = model.get_output_embeddings(), []
    plain = head.forward

    def watched(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return plain(hidden)

    head.forward = watched
    try:
        last_logits(model, prompt, DynamicCache(config=model.config))
    finally:
        del head.forward
    (hidden,) = seen
    assert hidden.stride() == torch.empty(hidden.shape).stride()
    assert hidden.untyped_storage().nbytes() == hidden.nbytes


def test_rows_decoded_side_by_side_are_what_each_is_alone_and_end_where_each_ends() -> None:
    model, prompts = tiny.tiny_model("llama"), [tiny.random_tokens(12, seed=seed) for seed in (1, 2, 3)]
    tokenizer = planted.bytes_tokenizer()
    firsts = [int(tokens[0, -1]) for tokens in prompts]

    def alone(limit: int) -> list[list[int]]:
        found = []
        for tokens, first in zip(prompts, firsts, strict=True):
            cache = DynamicCache(config=model.config)
            prefill(model, tokens[:, :-1], cache)
            found.append(decode(model, tokenizer, first, cache, limit))
        return found

    def together(limit: int) -> list[list[int]]:
        cache = DynamicCache(config=model.config)
        last_logits(model, torch.cat(prompts)[:, :-1], cache)
        return decode_rows(model, tokenizer, firsts, cache, limit)

    wanted = alone(9)
    assert together(9) == wanted
    assert together(1) == [[first] for first in firsts]
    tokenizer.eos_token_id = next(token for token in wanted[0][1:] if token not in firsts)
    ended = alone(9)
    assert len({len(row) for row in ended}) > 1, "one ends before another, or nothing here is proved"
    assert together(9) == ended
