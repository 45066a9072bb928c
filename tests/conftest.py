"""Shared by all tests: one thread a process, and models that every test must leave as it found them."""

from collections.abc import Iterator

import pytest
import torch

import tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _models_keep_their_attention() -> Iterator[None]:
    yield
    for model, attn_implementation in tiny.shared_models():
        assert model.config._attn_implementation == attn_implementation
