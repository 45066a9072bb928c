"""Runs as a page of Markdown with figures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compresskv.errors import DataError
from compresskv.evaluation.figures import draw
from compresskv.evaluation.summary import Row, Table
from compresskv.system.files import write_text

_HOW_TO_READ = """\
Scores are per cent of what the benchmark can give, with a 95 % interval (bootstrap over cases, or over documents where
several cases are about one: too narrow where there are few, of no width where each task's cases all scored alike). *vs
full* and *vs best baseline* are mean differences over the same cases; the best baseline is the other method with the
highest score in the same setting, at the same budget or as many bytes, that holds no more of them. **Bold**: the
highest score at a budget, or at as many bytes. *exact*: every key answer stands in the prediction. *KL* is in nats per
token from the full cache's distribution; *top-1* is how often both choose the same token; *tokens* are those retained,
mean over layers and KV heads, and *KV MB* the bytes of keys and values really held; *select s* is scoring, selecting
and gathering, in seconds."""


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else digits(100 * row[name])


def _number(name: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else digits(row[name] / scale)


def digits(value: float) -> str:
    """A number with about three digits."""
    if 0 < value < 0.0005:
        return "<0.001"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _score(row: Row) -> str:
    if row["score"] is None:
        return ""
    mean, low, high = (100 * one for one in row["score"])
    return f"{mean:.1f}" if row["num_cases"] == 1 else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _divergence(row: Row) -> str:
    if row["kl_interval"] is None:
        return ""
    mean, low, high = map(digits, row["kl_interval"])
    return mean if row["num_cases"] == 1 else f"{mean} [{low}, {high}]"


def _difference(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if row[name] is None:
            return ""
        # adding 0.0 turns -0.0, which would be written '-0.0', into 0.0
        mean, low, high = (round(100 * row[name][end], 1) + 0.0 for end in ("mean", "low", "high"))
        return f"{mean:+.1f}" if row[name]["num_cases"] == 1 else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

    return text


COLUMNS: dict[str, Callable[[Row], str]] = {
    "configuration": lambda row: str(row["config"]),
    "tasks": lambda row: str(row["num_tasks"]),
    "cases": lambda row: str(row["num_cases"]),
    "score": _score,
    "vs full": _difference("from_full"),
    "vs best baseline": _difference("from_best_baseline"),
    "exact %": _percent("exact_match"),
    "ROUGE-1 %": _percent("rouge_1_recall"),
    "evidence %": _percent("evidence_recall"),
    "KL": _divergence,
    "top-1 %": _percent("top1_agreement"),
    "tokens": _number("retained_tokens"),
    "retained %": _percent("retained_fraction"),
    "KV MB": _number("kv_nbytes", 1e6),
    "select s": _number("select_s"),
}
"""Title -> the text of a row's cell, '' where there is no value."""


def write_pages(data: dict[str, Any], output: Path) -> Path:
    """Write report.md and its figures, made of what `report_data` found, into folder `output`.

    Returns: the path of report.md.

    Raises:
        DataError: `output` cannot be written.
        ConfigError: matplotlib is missing, or a figure cannot be written.
    """
    lines = ["# Results", "", f"From {', '.join(f'`{run}`' for run in data['runs'])}.", "", _HOW_TO_READ]
    names: set[str] = set()
    for section in data["models"]:
        name = _file_name(f"{Path(section['model']).name}-{section['dtype']}", names)
        names.add(name)
        drawn = draw(section, output / "figures", name)
        lines += ["", *_section(section, {title: path.relative_to(output) for title, path in drawn.items()})]
    path = output / "report.md"
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {str(path)!r}: {error.strerror}") from error
    return path


def heading(section: dict[str, Any]) -> str:
    """What a section is about: the model, its dtype, and how prompts were read, if not exactly."""
    read = "" if section["prefill"] == "exact" else f", {section['prefill']} prefill"
    return f"{section['model']} ({section['dtype']}{read})"


def _section(section: dict[str, Any], drawn: dict[str, Path]) -> list[str]:
    lines = [f"## {heading(section)}", "", *_header(section)]
    groups = [table for table in section["groups"] if len(table["tasks"]) > 1]
    overall = section["overall"]
    if len(overall["tasks"]) > 1:
        lines += ["", f"### Overall: mean over {len(overall['tasks'])} tasks", "", *_markdown(overall)]
    for title, path in drawn.items():
        lines += ["", f"![{title}]({path.as_posix()})"]
    if len(section["groups"]) > 1:  # with one group, the overall table is that group's
        for table in groups:
            lines += ["", f"### {table['name']}: mean over {len(table['tasks'])} tasks", "", *_markdown(table)]
    for table in section["tasks"]:
        lines += ["", f"### {table['tasks'][0]}", "", *_markdown(table)]
    return lines


def _header(section: dict[str, Any]) -> list[str]:
    examples = {table["tasks"][0]: max(row["num_cases"] for row in table["rows"]) for table in section["tasks"]}
    shortest, longest = section["prompt_tokens"]
    truncated = f"; {section['num_truncated']} of them truncated" if section["num_truncated"] else ""
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in section["versions"].items())
    lines = [
        f"- Examples: {', '.join(f'{task} {count}' for task, count in examples.items())}.",
        f"- Prompts: {section['num_prompts']}, of {shortest:,} to {longest:,} tokens{truncated}.",
        f"- Records: {section['num_records']}, served by {section['num_prefills']} prefills.",
        f"- Seed: {', '.join(map(str, section['seeds']))}.",
    ]
    return [*lines, f"- Versions: {versions}."] if versions else lines


def _markdown(table: Table) -> list[str]:
    """The table with its columns aligned, so that it can be read as it is, and what its best baselines are."""
    rows = table["rows"]
    columns = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    if all(row["num_tasks"] == len(table["tasks"]) for row in rows):
        del columns["tasks"]
    for at, row in enumerate(rows):
        columns["configuration"][at] = columns["configuration"][at].replace("|", "\\|")
        if row["best"]:
            columns["score"][at] = re.sub(r"^[\d.]+", r"**\g<0>**", columns["score"][at])
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    widths = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
    titles = list(columns)
    lines = ["| " + " | ".join(_padded(title, title, widths) for title in titles) + " |"]
    rule = (("-" * (widths[title] + 1) + ("-" if title == titles[0] else ":")) for title in titles)
    lines.append("|" + "|".join(rule) + "|")
    for at in range(len(rows)):
        lines.append("| " + " | ".join(_padded(columns[title][at], title, widths) for title in titles) + " |")
    baselines = dict.fromkeys(row["best_baseline"] for row in rows if row["best_baseline"])
    return [*lines, "", f"Best baselines: {', '.join(baselines)}."] if baselines else lines


def _padded(text: str, title: str, widths: dict[str, int]) -> str:
    return text.ljust(widths[title]) if title == "configuration" else text.rjust(widths[title])


def _file_name(text: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "model"
    number = 2
    while name in taken:
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
        number += 1
    return name
