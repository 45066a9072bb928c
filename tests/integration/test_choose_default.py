"""`scripts/choose-default`: what it runs, what it prints, and that a second run reads nothing anew."""

import runpy
import sys
from pathlib import Path

import pytest

import planted
from compresskv.evaluation.run_folder import read_run

CANDIDATES = ["snapkv[window_size=16,kernel_size=15]", "streaming_llm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and text to hide needles in."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("first", "second"):
        planted.save(folder / name)
    planted.write_haystack(folder / "haystack.txt", 600)
    return folder


def run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(place)
    options = ["--haystack", "haystack.txt", "--lengths", "1000", "--depths", "50", "--budgets", "40"]
    monkeypatch.setattr(sys, "argv", ["x", "first", "second", *options, "--candidates", ",".join(CANDIDATES)])
    runpy.run_module("benchmarks.choice", run_name="__main__")
    return capfd.readouterr().out


def test_every_candidate_is_measured_everywhere_and_one_is_chosen_without_each_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = run(place, monkeypatch, capfd)
    folders = [place / "runs/default" / model / kind for model in ("first", "second") for kind in ("needle", "ruler")]
    found = [read_run(folder)[1] for folder in folders]
    for records in found:
        assert {record.method for record in records} == {"full", *CANDIDATES}
        assert all(record.prediction is None for record in records if record.method != "full")
    cells = [line for line in out.splitlines() if line.startswith(("| first,", "| second,"))]
    assert [line.split(" |")[0] for line in cells] == [
        f"| {model}, {group} at 40"
        for model in ("first", "second")
        for group in ("needles", "several needles", "variables")
    ]
    assert "\nChosen on all models: " in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("Without ")] == [
        "Without first",
        "Without second",
    ]
    before = [(folder / "records.jsonl").read_bytes() for folder in folders]
    assert run(place, monkeypatch, capfd) == out
    assert [(folder / "records.jsonl").read_bytes() for folder in folders] == before
