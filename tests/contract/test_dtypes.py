"""Half precision: finite, exact in its counts, and the first token that of the full cache."""

import pytest
import torch

import compresskv
import tiny

NUM_PROMPT = 90


@pytest.mark.parametrize("padded", [False, True], ids=["one_row", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_works(
    family: str, attn_implementation: str, method: str, store: str, dtype: torch.dtype, padded: bool
) -> None:
    model = tiny.tiny_model(family, attn_implementation, dtype)
    rows = [tiny.random_tokens(length, seed=length) for length in ([NUM_PROMPT, 40] if padded else [NUM_PROMPT])]
    prompt, prompt_mask = tiny.left_padded(rows)
    more = tiny.random_tokens(9, batch_size=len(rows))
    sequence, mask = torch.cat([prompt, more], dim=1), torch.cat([prompt_mask, torch.ones_like(more)], dim=1)
    with compresskv.compressing(model, method, 24, store=store, **tiny.options_for(model, method)) as cache:
        first = tiny.read(model, cache, sequence, [NUM_PROMPT], mask)[:, -1]
        later = tiny.read(model, cache, sequence, [1, 1, 6, 1], mask)
    with torch.no_grad():
        plain = model(prompt, attention_mask=prompt_mask, position_ids=tiny.position_ids(prompt_mask)).logits[:, -1]
    assert first.argmax(dim=-1).tolist() == plain.argmax(dim=-1).tolist()
    assert torch.isfinite(later).all()
    layers = cache.compressed_layers
    assert all(layer.keys is not None and layer.keys.dtype == dtype for layer in layers)
    if not padded:
        expected = NUM_PROMPT if method == "full" else 24
        assert sum(layer.num_retained - 9 for layer in layers) == expected * len(layers)
