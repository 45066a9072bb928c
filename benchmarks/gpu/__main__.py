"""`scripts/check-gpu`: contract tests, the bench table, bounded memory and the way to the last token, on a GPU.

Each part is a process of its own, with a time limit. What it finds goes into one JSON as it comes, and the figure is
drawn anew after each part.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.figure import draw
from benchmarks.gpu.parts import PARTS
from benchmarks.processes import answer_part, run_part
from compresskv.cli.terminal import err
from compresskv.errors import ConfigError
from compresskv.system.files import write_text
from compresskv.system.interrupts import ended_once

MODULE = "benchmarks.gpu"
_METHODS = ("snapkv", "blend")
_MINUTES = 10.0
"""What the limits of the parts are meant for."""

PartTask = tuple[str, dict[str, Any], float]
"""A part's name, its task, and the seconds it may take of ten minutes."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    large: str = "llama-8b"
    small: str = "llama-1b"
    lengths: tuple[int, ...] = (8192, 32_768, 131_072)
    budget: int = 1024
    new_tokens: int = 33
    """Of the rows of a table."""
    to_the_end: int = 1024
    """Tokens that are generated after each prompt of the figure."""
    dtype: str | None = None
    limit_nbytes: int = 24_000_000_000
    decode: str = "compiled"
    every: int = 40
    """A test of how many runs, in ten minutes."""
    tests: tuple[str, ...] = ("tests/contract",)


TINY = Sizes(
    "tiny", "tiny", (128, 192), 32, 5, 6, "float32", decode="eager", tests=("tests/contract/test_full_budget.py",)
)


@app.command()
def check(
    output: Annotated[Path, typer.Option("--output", "-o", help="The result; a figure lies beside it.")] = Path(
        "runs/check-gpu.json"
    ),
    minutes: Annotated[float, typer.Option(help="All parts together; what does not fit is left out.")] = _MINUTES,
    device: Annotated[str, typer.Option(help="Another than the GPU, to try it.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Few and short, to try it.")] = False,
    only: Annotated[str, typer.Option(help="Names of parts, with commas between; all without.")] = "",
) -> None:
    """Everything that is to be known of this GPU, in one run."""
    sizes, ends = TINY if tiny else Sizes(), time.monotonic() + 60 * minutes
    chosen = _chosen(list(tasks(sizes, device, minutes)), only)
    parts: dict[str, Any] = {}
    result = {"minutes": minutes, "device": device, "parts": parts}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, task, share_s in chosen:
        limit_s = min(share_s * max(1.0, minutes / _MINUTES), ends - time.monotonic())
        if limit_s < 5:
            parts[name] = {"failed": "no time was left", "task": task}
        else:
            err.print(f"{name}, at most {limit_s:.0f} s")
            parts[name] = {
                "task": task,
                **run_part(MODULE, task | {"deadline_s": limit_s - 20}, limit_s, task.get("environment", {})),
            }
            err.print(f"  {parts[name]['failed'] or 'done'} in {parts[name]['part_s']:.0f} s")
        write_text(output, json.dumps(result, indent=1))
        try:
            draw(result, output.with_suffix(".png"))
        except ConfigError as error:  # without matplotlib, another machine draws it
            result["figure"] = str(error)
    raise typer.Exit(1 if any(part["failed"] for part in parts.values()) else 0)


def _chosen(parts: list[PartTask], only: str) -> list[PartTask]:
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := wanted - {name for name, *_ in parts}:
        names = ", ".join(name for name, *_ in parts)
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is no part of it; parts are {names}", param_hint="--only")
    return [part for part in parts if not wanted or part[0] in wanted]


@app.command()
def plot(result: Path) -> None:
    """Draw the figure of a result again."""
    draw(json.loads(result.read_text(encoding="utf-8")), result.with_suffix(".png"))


@app.command(hidden=True)
def part(task: str, answer: Path) -> None:
    """One part, in a process of its own; what it finds goes to the file `answer`."""
    answer_part(PARTS, task, answer)


def tasks(sizes: Sizes, device: str, minutes: float) -> Iterator[PartTask]:
    """The parts by name, each with its task and the seconds it may take of ten minutes: what is wanted most, first."""
    shared: dict[str, Any] = {"device": device, "dtype": sizes.dtype, "budget": sizes.budget, "decode": sizes.decode}
    rows: dict[str, Any] = {"lengths": sizes.lengths, "new_tokens": sizes.new_tokens, "methods": _METHODS}
    ends = {"lengths": sizes.lengths, "new_tokens": sizes.to_the_end, "geometry": sizes.large}
    limit = {"limit_nbytes": sizes.limit_nbytes, "length": sizes.lengths[-1], "new_tokens": sizes.new_tokens}

    def task(kind: str, **own: Any) -> dict[str, Any]:
        return {"kind": kind, **shared, **own}

    yield "starts", task("starts"), 60
    yield "24 GB", task("bounded", geometry=sizes.large, method="blend", **limit), 90
    yield "large table", task("table", geometry=sizes.large, **rows), 150
    for method in _METHODS:
        yield f"to the end with {method}", task("end_to_end", method=method, **ends), 90
    every = max(1, round(sizes.every * _MINUTES / max(minutes, _MINUTES)))
    yield "tests", task("contract", every=every, tests=sizes.tests), 120
    yield "small table", task("table", geometry=sizes.small, **rows), 90
    ragged: Mapping[str, Any] = rows | {"lengths": sizes.lengths[:1], "methods": ("blend",)}
    by_kernel = {"environment": {"COMPRESSKV_TRITON": "1"}}
    yield "table by the kernel for ragged heads", task("table", geometry=sizes.large, **ragged, **by_kernel), 90
    yield "to the end with plain", task("end_to_end", method="plain", **ends), 270
    beside: Mapping[str, Any] = rows | {"lengths": sizes.lengths[:2]}
    yield "kvpress", task("peers", geometry=sizes.small, **beside), 120


if __name__ == "__main__":
    with ended_once():  # a part's process would go on without this one
        app()
