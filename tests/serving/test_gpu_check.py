"""`scripts/check-serving-gpu` measures what it says, here on the CPU with a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
from random_model import readable_engine_options

from benchmarks.serving.results import Results


@pytest.mark.slow
def test_every_part_measures(readable: Path, tmp_path: Path, clean_environment: dict[str, str]) -> None:
    readable_engine_options(readable)
    rows_file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.serving.gpu", "check", "-o", str(rows_file), "--model", str(readable)]
    command += ["--profile", str(readable / "profile.json"), "--budget", "60", "--requests", "3", "--length", "300"]
    command += ["--new-tokens", "8", "--pools", "0,2", "--eager"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=clean_environment, cwd=root, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr
    rows = Results(rows_file, None).rows
    starts, at_once, in_chunks, _, *loads = rows
    assert (starts["num_tokens"], starts["evicted_prompts"]) == (20, 1)
    for exact in (at_once, in_chunks):
        assert exact["same_positions"] == [1.0, 1.0, 1.0]
        assert exact["same_tokens"] == [exact["num_tokens"]] * 3
    assert [(row["pool"], row["compressed"]) for row in loads] == [(0, False), (0, True), (2, False), (2, True)]
    assert [row.get("evicted_prompts") for row in loads] == [None, 4, None, 4]  # one to warm up
    assert [row["max_running"] for row in loads[2:]] == [2, 3]
