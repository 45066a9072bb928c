"""Shared by contract tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tiny
from compresskv.cache.stores import retain
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.compiled import decoding, packed
from compresskv.compiled.step_layer import additive
from reference_store import ReferenceStore
from uncompiled import UncompiledPackage

FORCED_STORES = {"ragged": RaggedStore, "reference": ReferenceStore}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What holds a layer must make no difference: pairs of parameters are run with stores not made for them, too.

    The marker `stores` says which of them a test can be run with, and why no others.
    """
    names = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark)}
    marker = metafunc.definition.get_closest_marker("stores")
    forced = marker.args if marker else FORCED_STORES
    if "method" in names and len(names) > 1 and forced:
        metafunc.parametrize("_store", [None, *forced], indirect=True, ids=lambda name: name or "own_store")


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


@pytest.fixture(autouse=True)
def _store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold every cut in the named store, whatever it was made for."""
    if name := getattr(request, "param", None):
        monkeypatch.setattr(retain, "STORES", [FORCED_STORES[name]])


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
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Compiled steps unpack what is packed, as on GPUs: the masks of what was then attended to."""
    masks: list[Tensor] = []

    def noted(visible: Tensor, dtype: torch.dtype) -> Tensor:
        masks.append(visible)
        return additive(visible, dtype)

    monkeypatch.setattr(packed, "is_compiled_here", lambda *_: False)
    monkeypatch.setattr(packed, "packed_attention", None)
    monkeypatch.setattr(packed, "additive", noted)
    return masks


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding, "load_package", UncompiledPackage)
    decoding._loaded.clear()
    yield
    decoding._loaded.clear()
