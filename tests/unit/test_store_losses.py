"""What packed stores lose, by the plain way: a full cache that holds what a packed one would be read as."""

import pytest
import torch

import tiny
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.full import FullCache
from compresskv.cache.routed import RoutedLayer
from compresskv.calibration.stores import store_losses
from compresskv.methods.full import Full


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_as_a_full_cache_of_what_is_unpacked(family: str) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(90)
    question, answer = tiny.random_tokens(7, seed=1), tiny.random_tokens(6, seed=2)
    later = torch.cat([question, answer[:, :-1]], dim=1)
    with routing(model):
        read = FullCache(model, lambda layer_idx, _: RoutedLayer(layer_idx, model.config))
        model(prompt, past_key_values=read)
        losses = store_losses(model, read, question[0].tolist(), answer[0].tolist())
        full = model(later, past_key_values=read.branch()).logits[0, -6:].log_softmax(-1)
        for name, loss in losses.items():
            packed, unpacked = CompressedCache(model, Full(), 1.0, store=name), read.branch()
            packed.adopt(read)
            assert packed.compressed_layers[0].nbytes < read.routed[0].keys.nbytes * 2
            for source, layer in zip(packed.compressed_layers, unpacked.routed, strict=True):
                layer.keys, layer.values = (
                    torch.cat(states, dim=1) for states in zip(*source.store.heads(), strict=True)
                )
            found = model(later, past_key_values=unpacked).logits[0, -6:].log_softmax(-1)
            assert loss == pytest.approx(float((full.exp() * (full - found)).sum()) / 6, abs=2e-5)
    assert 0 < losses["int8"] < losses["int4k8"] < losses["int4"]
    assert read.get_seq_length() == 90
