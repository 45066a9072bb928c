"""`compresskv report`: tables and figures of what benchmark runs found."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from compresskv.cli.options import JsonOption, split_names
from compresskv.cli.outputs import check_future_folder
from compresskv.cli.terminal import counted, err, new_table, out
from compresskv.errors import ConfigError
from compresskv.system.paths import is_folder

EPILOG = """\b
Examples:
  compresskv report runs/needle
  compresskv report runs/needle runs/longbench --output results
  compresskv report runs/needle --json
"""

_SHOWN = ("configuration", "tasks", "score", "vs full", "vs best baseline", "KL", "tokens", "retained %", "KV MB")
_IN_GROUPS = ("configuration", "tasks", "cases", "score", "vs full", "KL", "tokens", "KV MB")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs, or of a suite. Of a case in several, the last run's counts.", metavar="RUN"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.md and figures. Default: RUN; of several, ./report.",
            metavar="FOLDER",
        ),
    ] = None,
    own: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare with the best of the others. Default: this project's.", metavar="METHODS"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report of benchmark runs: tables with intervals, and figures; print the overall table."""
    from compresskv.evaluation.report import write_pages
    from compresskv.evaluation.suite import runs_of
    from compresskv.evaluation.summary import report_data

    place = output or (runs[0] if len(runs) == 1 else Path("report"))
    if output is not None or len(runs) > 1 or is_folder(place):  # else there is no run, which is told below
        check_future_folder("output", place, ("report.md",))
    methods = None if own is None else split_names(own)
    if methods == ():
        raise ConfigError("names no method: give some, or leave it out", option="own", value=own)
    data = report_data([run for folder in runs for run in runs_of(folder)], methods)
    path = write_pages(data, place)
    if as_json:
        out.print_json(json.dumps({"file": str(path), **data}))
        return
    for section in data["models"]:
        out.print(_overall(section), soft_wrap=False)
    err.print(f"report: {path}")


def _overall(section: dict[str, Any]) -> Table:
    """The overall table, without what the terminal has no room for."""
    from compresskv.evaluation.report import heading

    overall = section["overall"]
    rows, tasks = overall["rows"], overall["tasks"]
    name = tasks[0] if len(tasks) == 1 else f"mean over {counted(len(tasks), 'task')}"
    name += f", {counted(_most_cases(rows), 'case')}"
    cells = _cells(rows, _SHOWN)
    if any(cells["score"]):
        del cells["KL"]
    for title in ("vs full", "vs best baseline"):
        cells[title] = [text.partition(" ")[0] for text in cells[title]]
    if all(row["num_tasks"] == len(tasks) for row in rows):
        del cells["tasks"]
    if out.width < 100:
        del cells["retained %"]  # tokens and bytes tell as much
    cells = {title: column for title, column in cells.items() if any(column)}
    numbers = [column for column in cells if column != "configuration"]
    table = new_table(*cells, numbers=numbers, title=f"{heading(section)}\n{name}")
    for at, row in enumerate(rows):
        table.add_row(*(column[at] for column in cells.values()), style="bold" if row["best"] else None)
    return table


def group_tables(section: dict[str, Any]) -> list[Table]:
    """A table for each benchmark, with intervals."""
    from compresskv.evaluation.report import heading

    tables = []
    for group in section["groups"]:
        rows = group["rows"]
        cells = _cells(rows, _IN_GROUPS)
        for title, same in (("tasks", {str(len(group["tasks"]))}), ("cases", set(cells["cases"]))):
            if set(cells[title]) == same and len(same) == 1:
                del cells[title]
        cells = {title: column for title, column in cells.items() if any(column)}
        name = f"{group['name']}: {counted(len(group['tasks']), 'task')}, {counted(_most_cases(rows), 'case')}"
        numbers = [column for column in cells if column != "configuration"]
        table = new_table(*cells, numbers=numbers, title=f"{name}\n{heading(section)}")
        for at, row in enumerate(rows):
            table.add_row(*(column[at] for column in cells.values()), style="bold" if row["best"] else None)
        tables.append(table)
    return tables


def _cells(rows: list[dict[str, Any]], titles: Iterable[str]) -> dict[str, list[str]]:
    """A column of text by its title; a narrow terminal breaks a configuration's name behind its commas."""
    from compresskv.evaluation.report import COLUMNS

    cells = {title: [COLUMNS[title](row) for row in rows] for title in titles}
    return {**cells, "configuration": [name.replace(",", ", ") for name in cells["configuration"]]}


def in_short(section: dict[str, Any]) -> dict[str, Any]:
    """What `group_tables` shows, JSON values only."""
    return {name: section[name] for name in ("model", "dtype", "prefill", "groups")}


def _most_cases(rows: list[dict[str, Any]]) -> int:
    return max(int(row["num_cases"]) for row in rows)
