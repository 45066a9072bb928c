"""Reading a prompt and choosing its next token."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import tiny
from compresskv.models.decoding import last_logits


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
