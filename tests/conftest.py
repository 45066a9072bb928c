"""Shared by all tests: one thread a process, and models that every test must leave as it found them."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

import tiny

torch.set_num_threads(1)
if sys.version_info < (3, 12):  # else setuptools replaces distutils, and tests that compile depend on those before them
    os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")


@pytest.fixture(autouse=True)
def _models_keep_their_attention() -> Iterator[None]:
    yield
    for model, attn_implementation in tiny.shared_models():
        assert model.config._attn_implementation == attn_implementation
