"""`scripts/check-gpu` from beginning to end, on the CPU with the tiny geometry."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_finds_something(tmp_path: Path) -> None:
    output = tmp_path / "new" / "check.json"
    command = ["scripts/check-gpu", "--device", "cpu", "--tiny", "--minutes", "10", "-o", str(output)]
    environment = {**os.environ, "COMPRESSKV_PYTHON": sys.executable, "COMPRESSKV_PEERS_PYTHON": "absent"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert parts["starts"]["machine"]["device"] == "cpu"
    assert parts["tests"]["passed"] > 0
    assert parts["tests"]["failures"] == []
    assert "absent" in parts["kvpress"]["absent"]
    assert {name: len(part["rows"]) for name, part in parts.items() if "rows" in part} == {
        "table, large": 6,
        "table, small": 6,
        "table, by the kernel for ragged heads": 2,
        "to the end, snapkv": 2,
        "to the end, blend": 2,
        "to the end, plain": 2,
    }
    assert output.with_suffix(".png").is_file()
