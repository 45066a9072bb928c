"""What packed stores and cut caches lose, by the plain way: a full cache that holds what they would be read as."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.full import FullCache
from compresskv.cache.routed import RoutedLayer
from compresskv.calibration.stores import SHARES, document_losses, store_losses
from compresskv.methods.full import Full
from compresskv.methods.knorm import KNorm


def asked(family: str) -> tuple[Any, FullCache, Tensor, Tensor]:
    """A model that has read a prompt, what is asked, and an answer of six tokens."""
    model = tiny.tiny_model(family)
    read = FullCache(model, lambda layer_idx, _: RoutedLayer(layer_idx, model.config))
    model(tiny.random_tokens(90), past_key_values=read)
    return model, read, tiny.random_tokens(7, seed=1), tiny.random_tokens(6, seed=2)


def loss_by_hand(model: Any, read: FullCache, later: Tensor, held: CompressedCache) -> float:
    """Of a full cache that holds what another holds, unpacked, where all heads hold as many."""
    unpacked = read.branch()
    for source, layer in zip(held.compressed_layers, unpacked.routed, strict=True):
        layer.keys, layer.values = (torch.cat(states, dim=1) for states in zip(*source.store.heads(), strict=True))
    places = torch.arange(90, 90 + later.shape[1])[None]
    full = model(later, past_key_values=read.branch()).logits[0, -6:].log_softmax(-1)
    found = model(later, past_key_values=unpacked, position_ids=places).logits[0, -6:].log_softmax(-1)
    return float((full.exp() * (full - found)).sum()) / 6


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_as_a_full_cache_of_what_is_unpacked(family: str) -> None:
    with routing(tiny.tiny_model(family)):
        model, read, question, answer = asked(family)
        later = torch.cat([question, answer[:, :-1]], dim=1)
        losses = store_losses(model, read, question[0].tolist(), answer[0].tolist())
        for name, loss in losses.items():
            packed = CompressedCache(model, Full(), 1.0, store=name)
            packed.adopt(read)
            assert packed.compressed_layers[0].nbytes < read.routed[0].keys.nbytes * 2
            assert loss == pytest.approx(loss_by_hand(model, read, later, packed), abs=2e-5)
    assert 0 < losses["int8"] < losses["int4k8"] < losses["int4"] < losses["int2"]
    assert read.get_seq_length() == 90


@torch.no_grad()
def test_as_a_full_cache_of_what_is_kept() -> None:
    with routing(tiny.tiny_model("llama")):
        model, read, question, answer = asked("llama")
        later = torch.cat([question, answer[:, :-1]], dim=1)
        losses = document_losses(model, read, question[0].tolist(), answer[0].tolist(), KNorm())
        assert list(losses) == [f"{share:g}" for share in SHARES]
        for share, loss in losses.items():
            cut = CompressedCache(model, KNorm(), float(share))
            cut.adopt(read)
            assert loss == pytest.approx(loss_by_hand(model, read, later, cut), abs=2e-5)
    assert min(losses.values()) > 1e-4
    assert read.get_seq_length() == 90
