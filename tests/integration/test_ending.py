"""Processes that are told to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import planted
import shrunk


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_killed_compile_leaves_no_folder(tmp_path: Path) -> None:
    model, compiled = tmp_path / "model", tmp_path / "cache" / "compiled"
    shrunk.build("llama", vocab_size=600, num_positions=4096).save_pretrained(model)
    planted.bytes_tokenizer().save_pretrained(model)
    command = [sys.executable, "-m", "compresskv", "compile", "--model", str(model), "--method", "snapkv"]
    environment = {**os.environ, "COMPRESSKV_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
        deadline = time.monotonic() + 120
        while not list(compiled.glob(".*.*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(compiled.glob(".*.*"))
        for one in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(one)
            time.sleep(0.05)
        _, told = process.communicate(timeout=120)
    # Python may hear both at once, or the second when all is cleaned up.
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGINT)
    assert "Traceback" not in told
    assert list(compiled.glob(".*.*")) == []
    assert not [path for path in compiled.iterdir() if path.is_dir()]
