"""Shared by contract tests."""

import os
from collections.abc import Iterator

import pytest
import torch

import tiny
from compresskv.compiled import decoding
from uncompiled import UncompiledPackage


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """What a test makes lies where its models do, if that was asked for: PyTorch then looks at every operation."""
    if tiny.DEVICE_VARIABLE not in os.environ:
        yield
        return
    before = torch.get_default_device()
    torch.set_default_device(tiny.DEVICE)
    yield
    torch.set_default_device(before)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding, "load_package", UncompiledPackage)
    decoding._loaded.clear()
    yield
    decoding._loaded.clear()
