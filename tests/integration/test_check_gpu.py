"""`scripts/check-gpu` as a command, on the CPU with the tiny geometry."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["starts", "to the end with snapkv", "tests", "kvpress"]
"""Those that unit tests do not call, and one that draws."""


@pytest.mark.slow
def test_parts_find_something_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "new" / "check.json"
    command = ["scripts/check-gpu", "--device", "cpu", "--tiny", "-o", str(output), "--only", ",".join(PARTS)]
    environment = {**os.environ, "COMPRESSKV_PYTHON": sys.executable, "COMPRESSKV_PEERS_PYTHON": "absent"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert list(parts) == PARTS
    assert parts["starts"]["machine"]["device"] == "cpu"
    assert parts["tests"]["passed"] > 0
    assert parts["tests"]["failures"] == []
    assert "absent" in parts["kvpress"]["absent"]
    assert len(parts["to the end with snapkv"]["rows"]) == 2
    assert output.with_suffix(".png").is_file()
