"""A part of a check in a process of its own, with a time limit: one that hangs or crashes leaves the others.

What a part finds goes to a file as it comes, so that one that ran out of time has told what it knew.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compresskv.system.files import write_text

_LOG_TAIL = 2000  # characters of what a part that failed had to say

Part = Callable[[dict[str, Any], Callable[[Mapping[str, Any]], None]], Mapping[str, Any]]
"""Is given its task, and a function to tell by what it has found so far; returns all that it found."""


def run_part(
    module: str, task: Mapping[str, Any], limit_s: float, environment: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Run `python -m MODULE part TASK ANSWER`, which calls `answer_part`.

    Returns: what it found, how it `failed` if it did, and the seconds that it took.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log, answer = Path(folder) / "log", Path(folder) / "answer"
        command = [sys.executable, "-m", module, "part", json.dumps(task), str(answer)]
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )
            try:
                code = process.wait(timeout=limit_s)
                failed = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                failed = f"no answer in {limit_s:.0f} s"
            finally:
                _end(process)
        row: dict[str, Any] = {"failed": failed, "part_s": round(time.perf_counter() - started, 1)}
        if failed:
            row["log"] = log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
        return row | found


def answer_part(parts: Mapping[str, Part], task: str, answer: Path) -> None:
    """Do one part in this process, which ends with it."""
    given = json.loads(task)

    def tell(found: Mapping[str, Any]) -> None:
        write_text(answer, json.dumps(found))

    tell(parts[given["kind"]](given, tell))
    os._exit(0)  # an engine in the process may take its time to end


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it with what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
