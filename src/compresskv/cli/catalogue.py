"""`compresskv methods` and `compresskv models`: what there is to choose from."""

import json
from typing import Any

from rich.table import Table

from compresskv.cli.options import JsonOption
from compresskv.cli.terminal import new_table, out


def methods(as_json: JsonOption = False) -> None:
    """List the compression methods."""
    from compresskv.methods.base import option_defaults
    from compresskv.methods.registry import methods as registered

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": method.summary,
            "source": method.source,
            "needs_profile": method.needs_profile,
            "options": option_defaults(method),
        }
        for name, method in registered().items()
    ]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    out.print(_table(rows), soft_wrap=False)
    out.print("Options: --set NAME=VALUE, or --method 'snapkv[window_size=32,kernel_size=15]'")


def _table(rows: list[dict[str, Any]]) -> Table:
    """Lines break between words and between options only: a name in two pieces cannot be copied."""
    options = [", ".join(f"{name}={value}" for name, value in row["options"].items()) for row in rows]
    table = new_table("method", "what it keeps, source", "options")
    table.columns[0].no_wrap = True
    table.columns[2].min_width = max(len(word) for text in options for word in text.split())
    for row, text in zip(rows, options, strict=True):
        kept = [row["summary"], row["source"].strip("-"), "needs a profile" if row["needs_profile"] else ""]
        table.add_row(row["name"], "\n".join(filter(None, kept)), text, end_section=True)
    return table


def models(as_json: JsonOption = False) -> None:
    """List the models that need no hub, and the forms in which others can be named."""
    from compresskv.methods.registry import methods as registered
    from compresskv.models.embedded import EMBEDDED, is_cached

    rows = [
        {
            "name": name,
            "description": model.description,
            "context_length": model.context_length,
            "downloaded": is_cached(name),
        }
        for name, model in EMBEDDED.items()
    ]
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = new_table("model", "what it is", "context", "downloaded", numbers=("context",))
    for row in rows:
        table.add_row(
            str(row["name"]),
            str(row["description"]),
            f"{row['context_length']:,}",
            "yes" if row["downloaded"] else "no",
        )
    out.print(table, soft_wrap=False)
    out.print("--model also takes a hub id (org/name), a folder with a transformers model, or a .gguf file.")
    out.print(
        "Most decoder-only models with full-attention layers work: docs/models.md says which are refused, and why."
    )
    needing = [name for name, method in registered().items() if method.needs_profile]
    out.print(f"The methods {', '.join(needing[:-1])} and {needing[-1]} need a profile of it.")
