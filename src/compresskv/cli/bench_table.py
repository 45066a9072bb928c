"""The tables of `compresskv bench`, each within 80 columns."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from compresskv.cli.terminal import counted, megabytes, new_table, out

Cell = Callable[[dict[str, Any]], str]
_NOTHING = "-"


def _number(key: str, pattern: str) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        return _NOTHING if row[key] is None else format(row[key], pattern)

    return cell


def _megabytes(key: str) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        return _NOTHING if row[key] is None else megabytes(row[key])

    return cell


_PREFILL: dict[str, Cell] = {
    "prefill s": _number("prefill_s", ".3f"),
    "x plain": _number("prefill_ratio", ".3f"),
    "x least": _number("prefill_to_least", ".1f"),
    "scoring s": _number("scoring_s", ".4f"),
    "eviction s": _number("eviction_s", ".4f"),
    "first s": _number("first_token_s", ".3f"),
}
_DECODE: dict[str, Cell] = {
    "decode ms": _number("decode_ms", ".2f"),
    "x plain": _number("decode_ratio", ".3f"),
    "x short": _number("decode_ratio_short", ".3f"),
    "x least": _number("decode_to_least", ".1f"),
    "tokens": _number("held_tokens", ",.0f"),
    "KV MB": _megabytes("kv_nbytes"),
    "peak MB": _megabytes("peak_nbytes"),
}
_NO_GAIN: dict[str, Cell] = {
    "prompt": _number("prompt_tokens", ",d"),
    "scored": lambda row: _NOTHING if row["num_scorings"] is None else f"{row['num_scorings']} times",
    "scoring s": _number("scoring_s", ".4f"),
    "prefill x plain": _number("prefill_ratio", ".3f"),
    "decode x plain": _number("decode_ratio", ".3f"),
}


def print_result(result: dict[str, Any]) -> None:
    """Tables of each length, then of prompts within the budget, then what was measured and on what."""
    from compresskv.bench.figure import row_name

    rows = result["rows"] + result.get("peers", [])
    for length in sorted({row["length"] for row in rows if row["length"] in result["settings"]["lengths"]}):
        own = [row for row in rows if row["length"] == length and not row["within_budget"]]
        tokens = f"{length:,} tokens"
        out.print(_table(f"{tokens}: reading the prompt", own, _PREFILL, row_name), soft_wrap=False)
        out.print(_table(f"{tokens}: generating, and memory", own, _DECODE, row_name), soft_wrap=False)
    within = [row for row in rows if row["within_budget"]]
    if within:
        title = "prompts within the budget, where nothing is gained"
        out.print(_table(title, within, _NO_GAIN, row_name), soft_wrap=False)
    out.print("\n".join(_remarks(result)))


def _table(title: str, rows: Sequence[dict[str, Any]], cells: dict[str, Cell], name: Cell) -> Table:
    columns = {heading: [cell(row) for row in rows] for heading, cell in cells.items()}
    columns = {heading: column for heading, column in columns.items() if set(column) != {_NOTHING}}
    table = new_table("", *columns, numbers=columns, title=title)
    for at, row in enumerate(rows):
        table.add_row(_shown(row, name), *(column[at] for column in columns.values()))
    return table


def _shown(row: dict[str, Any], name: Cell) -> str:
    versions = row.get("versions")
    return f"{name(row)} ({versions['transformers']})" if versions and row["engine"] == "transformers" else name(row)


def _has_engines(result: dict[str, Any]) -> bool:
    return any(row["engine"] not in ("transformers", "kvpress") for row in result.get("peers", []))


def _remarks(result: dict[str, Any]) -> list[str]:
    limits, machine, model = result["limits"], result["machine"], result["model"]
    return [
        "x plain: to plain transformers on the same prompt, in the same rounds; x short: to it on a prompt of as many "
        "tokens as the budget",
        *(["other engines' x plain: to the medians of all rounds"] if _has_engines(result) else []),
        f"x least: to the limit of {limits['read_bytes_per_s'] / 1e9:.1f} GB/s (weights and KV cache read once a "
        f"token) and {limits['matmul_flop_per_s'] / 1e9:,.0f} GFLOP/s (the prompt's matrix products)",
        f"{model['name']}, {model['dtype']}, {model['weights_nbytes'] / 1e6:,.0f} MB of weights; "
        f"{machine['processor']}, {counted(machine['threads'], 'thread')}; torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}",
        *result["notes"],
    ]
