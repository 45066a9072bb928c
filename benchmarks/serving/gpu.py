"""`scripts/check-serving-gpu`: what is to be known of the plugin on a GPU, in ten minutes, part by part.

Each part is a process of its own, with a time limit: one that hangs, or that ends the engine, leaves the others. Rows
are written as they come, and those that a file has are not asked for again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.processes import Part, answer_part, run_part
from benchmarks.serving import parts
from benchmarks.serving.__main__ import common_settings
from benchmarks.serving.results import Results
from compresskv.cli.terminal import err
from compresskv.system.interrupts import ended_once

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
    whole, in_chunks = 0, 512
    ways = [("float32", whole), ("float32", in_chunks), ("bfloat16", whole)]
    keys += [{"kind": "tokens", "dtype": dtype, "chunk_budget": kept} for dtype, kept in ways]
    keys += [load | {"pool": int(pool), "compressed": ours} for pool in pools.split(",") for ours in (False, True)]
    for key in keys:
        if results.has(key | {"failed": None}):
            continue
        row = run_part("benchmarks.serving.gpu", key | common | {"model": model}, limit)
        results.add(key, row)
        err.print(f"{key}: {row}")
    raise typer.Exit(0 if all(results.has(key | {"failed": None}) for key in keys) else 1)


@app.command(hidden=True)
def part(task: str, answer: Path) -> None:
    """One part, in a process of its own; its row goes to the file `answer`."""
    answer_part({kind: _telling_nothing(own) for kind, own in parts.PARTS.items()}, task, answer)


def _telling_nothing(own: Callable[[dict[str, Any]], dict[str, Any]]) -> Part:
    """A part that tells all that it finds at its end."""
    return lambda task, _: own(task)


if __name__ == "__main__":
    with ended_once():  # a part's process would go on without this one
        app()
