"""What the counters' folder may hold, and that nothing in it ends a server that writes its log."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from compresskv.serving.counters import Counters


@pytest.fixture
def own(tmp_path: Path) -> Counters:
    """This process's counters, beside those of another."""
    one = Counters(tmp_path)
    one.add("evicted_prompts", 1)
    one.add("evicted_tokens", 900)
    return one


def another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counters:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 7)
        return Counters(folder)


def test_processes_are_added_up(own: Counters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = another(tmp_path, monkeypatch)
    others.add("evicted_tokens", 100)
    others.add("scoring_seconds", 0.5)
    expected = {"evicted_prompts": 1, "evicted_tokens": 1000, "scoring_seconds": 0.5}
    assert own.totals() == dict.fromkeys(own.totals(), 0) | expected
    families: Any = MultiProcessCollector(CollectorRegistry(), path=str(tmp_path)).collect()
    shown = {family.name.removeprefix("compresskv:"): family.samples[0].value for family in families}
    assert shown == expected  # the endpoint reads the same


def test_vllms_own_metrics_may_lie_beside_them(own: Counters, tmp_path: Path) -> None:
    """Where PROMETHEUS_MULTIPROC_DIR is set. A gauge that was never set has no samples."""
    gauge = MmapedDict(str(tmp_path / "gauge_mostrecent_7.db"))
    gauge.read_value(mmap_key("vllm:a", "vllm:a", (), (), "help"))
    assert own.totals()["evicted_tokens"] == 900


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00\x04\x00\x00", b"\xff" * 64, b"\x40\x00\x00\x00" + b"\x7f" * 60],
    ids=["empty", "cut short", "bytes", "too long a name"],
)
def test_a_file_that_cannot_be_read_is_left_out(data: bytes, own: Counters, tmp_path: Path) -> None:
    (tmp_path / "counter_compresskv-7.db").write_bytes(data)
    (tmp_path / "counter_compresskv-8.db").mkdir()
    assert own.totals()["evicted_tokens"] == 900


def test_without_the_folder_it_counts_on(own: Counters, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    own.add("evicted_tokens", 100)
    totals = own.totals()
    assert (totals["evicted_tokens"], totals["evicted_prompts"]) == (1000, 1)
