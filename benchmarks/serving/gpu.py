"""`scripts/check-serving-gpu`: what is to be known of the plugin on a GPU, in ten minutes, part by part.

Each part is a process of its own, with a time limit: one that hangs, or that ends the engine, leaves the others. Rows
are written as they come, and those that a file has are not asked for again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.serving import parts
from benchmarks.serving.__main__ import common_settings
from benchmarks.serving.results import Results
from compresskv.cli.terminal import err
from compresskv.system.interrupts import ended_once

_LOG_TAIL = 2000  # characters of what a part that failed had to say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    output: Annotated[Path, typer.Option("--output", "-o", help="Rows, a line each.")] = Path(
        "runs/check-serving-gpu.jsonl"
    ),
    model: Annotated[str, typer.Option(help="Folder, hub id, or the embedded smollm2-135m.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="With options if any: vote, streaming_llm.")] = "vote",
    profile: Annotated[Path | None, typer.Option(help="A profile file; without it, the model's own.")] = None,
    budget: Annotated[int, typer.Option(help="Tokens kept of each prompt.")] = 256,
    requests: Annotated[int, typer.Option(help="Requests of a load.")] = 64,
    length: Annotated[int, typer.Option(help="Prompt tokens of each.")] = 7680,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each.")] = 256,
    pools: Annotated[str, typer.Option(help="Whole requests in the pool of a load; 0: vLLM's own pool.")] = "0,16",
    limit: Annotated[int, typer.Option(help="Seconds that a part may take.")] = 150,
    eager: Annotated[bool, typer.Option(help="Without compilation and CUDA graphs.")] = False,
) -> None:
    """Whether the plugin starts, whether its tokens are compressing's, and a load beside plain vLLM."""
    common = {"method": method, "profile": profile and str(profile.absolute()), "budget": budget, "eager": eager}
    results = Results(output, common_settings(model, "of each part", True) | common)
    load = {"kind": "load", "num_requests": requests, "length": length, "new_tokens": new_tokens}
    keys: list[dict[str, Any]] = [{"kind": "starts"}]
    keys += [{"kind": "tokens", "dtype": dtype} for dtype in ("float32", "bfloat16")]
    keys += [load | {"pool": int(pool), "compressed": ours} for pool in pools.split(",") for ours in (False, True)]
    for key in keys:
        if results.has(key | {"failed": None}):
            continue
        row = _in_a_process(key | common | {"model": model}, limit)
        results.add(key, row)
        err.print(f"{key}: {row}")
    raise typer.Exit(0 if all(results.has(key | {"failed": None}) for key in keys) else 1)


@app.command(hidden=True)
def part(task: str, answer: Path) -> None:
    """One part, in a process of its own; its row goes to the file `answer`."""
    given = json.loads(task)
    answer.write_text(json.dumps(parts.PARTS[given["kind"]](given)), encoding="utf-8")
    os._exit(0)  # an engine in the process may take its time to end


def _in_a_process(task: dict[str, Any], limit_s: int) -> dict[str, Any]:
    """The part's row: what it found, or how it failed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log, answer = Path(folder) / "log", Path(folder) / "answer"
        command = [sys.executable, "-m", "benchmarks.serving.gpu", "part", json.dumps(task), str(answer)]
        with log.open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(timeout=limit_s)
                failed = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                failed = f"no answer in {limit_s} s"
            finally:
                _end(process)
        row = {"failed": failed, "part_s": round(time.perf_counter() - started, 1)}
        if failed:
            return row | {"log": log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]}
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return row | found


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it with what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    with ended_once():  # a part's process would go on without this one
        app()
