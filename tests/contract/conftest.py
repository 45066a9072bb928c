"""Shared by contract tests."""

from collections.abc import Iterator

import pytest

from compresskv.compiled import decoding
from uncompiled import UncompiledPackage


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding, "load_package", UncompiledPackage)
    decoding._loaded.clear()
    yield
    decoding._loaded.clear()
