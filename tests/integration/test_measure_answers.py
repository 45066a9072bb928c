"""`scripts/measure-answers`: what it prints, and that a second run measures nothing anew."""

import runpy
import sys
from pathlib import Path

import pytest

import tiny


def test_losses_and_costs_of_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.build_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.random_words(400), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = ["--text", "text.txt", "--tokens", "192", "--interval", "32", "--decode", "40"]

    def run(*options: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["x", "model", *given, "--methods", "streaming_llm,snapkv", *options])
        runpy.run_module("benchmarks.answers", run_name="__main__")
        lines = capfd.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]

    rows = run("--budget", "60", "-o", "cut.jsonl")
    assert [row[:2] for row in rows] == [["model", "`streaming_llm`"], ["model", "`snapkv`"]]
    assert all(float(row[2]) > 0 and 0 < float(row[4].rstrip("%")) < 100 for row in rows)
    before = (tmp_path / "cut.jsonl").read_bytes()
    assert run("--budget", "60", "-o", "cut.jsonl") == rows
    assert (tmp_path / "cut.jsonl").read_bytes() == before
