"""`scripts/bench-serving`: measure what is asked for and add it to a file."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from compresskv.bench.machine import machine
from compresskv.cli.options import parse_numbers
from compresskv.cli.terminal import err
from compresskv.errors import CompressKVError, ConfigError
from compresskv.serving.bench.engine import BLOCK_SIZE, start_engine
from compresskv.serving.versions import installed_version

_MARGIN = 8  # tokens beyond a needle's prompt, which its answer may need


def main(
    what: Annotated[str, typer.Argument(help="load, single or quality.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Rows are added to this JSON file.")],
    model: Annotated[str, typer.Option(help="Folder, hub id, or the embedded smollm2-135m.")] = "smollm2-135m",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1000",
    budgets: Annotated[str, typer.Option(help="Tokens kept of each prompt.")] = "64,128,256,512",
    pools: Annotated[str, typer.Option(help="Sizes of the pool, in whole requests.")] = "3,6,12",
    requests: Annotated[int, typer.Option(help="Requests of a load, or needles for each length and depth.")] = 12,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each request of a load.")] = 120,
    repeats: Annotated[int, typer.Option(help="Rounds of 'single'.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw all loads of the file.", metavar="FILE.png")] = None,
) -> None:
    """Measure vLLM with the plugin beside vLLM without it, in one run."""
    from compresskv.embedded import EMBEDDED, ensure_embedded

    folder = str(ensure_embedded(model)) if model in EMBEDDED else model
    numbers = [parse_numbers(name, text, int) or () for name, text in (("--lengths", lengths), ("--budgets", budgets))]
    sizes = parse_numbers("--pools", pools, int) or ()
    if what == "load":
        rows = _loads(folder, numbers[0], numbers[1], sizes, requests, new_tokens, dtype)
    elif what == "single":
        rows = _singles(folder, numbers[0], numbers[1], repeats, dtype)
    elif what == "quality":
        rows = _quality(folder, numbers[0], numbers[1], requests, dtype)
    else:
        raise ConfigError(f"WHAT={what!r} is unknown: choose load, single or quality")
    result = _added(output, rows, model, dtype)
    if plot is not None:
        from compresskv.serving.bench.figure import draw_loads

        draw_loads(result["rows"], plot)


def _text(model: str) -> tuple[Any, list[int]]:
    """The tokenizer, and Python's help topics in tokens."""
    from transformers import AutoTokenizer

    from compresskv.profiles.calibration import read_haystack

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer("\n\n".join(read_haystack(())), verbose=False)["input_ids"]
    return tokenizer, ids


def _loads(
    model: str, lengths: Any, budgets: Any, pools: Any, num_requests: int, new_tokens: int, dtype: str
) -> list[dict[str, Any]]:
    from compresskv.serving.bench.load import Load, run_load

    _, text = _text(model)
    rows = []
    for length in lengths:
        blocks = math.ceil((length + new_tokens) / BLOCK_SIZE)
        for pool in pools:
            size = {"max_model_len": length + new_tokens, "num_blocks": pool * blocks, "dtype": dtype}
            plain, compressed = (start_engine(model, compressed=ours, **size) for ours in (False, True))
            run_load(plain, Load(256, pool, 2, 4), text, None)  # warms up
            for budget in (None, *budgets):
                engine = plain if budget is None else compressed
                row = run_load(engine, Load(length, pool, num_requests, new_tokens), text, budget)
                err.print(f"{row['length']} tokens, pool {pool}, budget {budget}: {_brief(row)}")
                rows.append(row)
    return rows


def _brief(row: dict[str, Any]) -> str:
    return (
        f"{row['wall_s']:.1f} s, {row['tokens_per_s']:.1f} tokens/s, {row['max_running']} at most and "
        f"{row['mean_running']:.1f} on average running, first token {row['first_token_s']:.1f} s"
    )


def _singles(model: str, lengths: Any, budgets: Any, repeats: int, dtype: str) -> list[dict[str, Any]]:
    from compresskv.serving.bench.single import run_single

    _, text = _text(model)
    size: dict[str, Any] = {"max_model_len": max(lengths) + 64, "num_blocks": None, "dtype": dtype}
    plain, compressed = (start_engine(model, compressed=ours, **size) for ours in (False, True))
    return [
        row
        for length in lengths
        for budget in budgets
        for row in run_single(plain, compressed, text, length, budget, repeats)
    ]


def _quality(model: str, lengths: Any, budgets: Any, limit: int, dtype: str) -> list[dict[str, Any]]:
    from compresskv.serving.bench.quality import run_quality, server

    tokenizer, _ = _text(model)
    rows = []
    for compressed, own in ((False, [None]), (True, list(budgets))):
        with server(model, compressed=compressed, max_model_len=max(lengths) + _MARGIN, dtype=dtype) as address:
            rows += run_quality(address, tokenizer, lengths, own, limit)
    return rows


def _added(output: Path, rows: list[dict[str, Any]], model: str, dtype: str) -> dict[str, Any]:
    """The file's rows and these, with what they were measured on."""
    import torch

    names = ("compresskv", "torch", "transformers")
    result: dict[str, Any] = {"model": model, "dtype": dtype, "machine": machine(torch.device("cpu")), "rows": []}
    result["versions"] = {name: version(name) for name in names} | {"vllm": installed_version()}
    result["versions"]["python"] = platform.python_version()
    if output.exists():
        result["rows"] = json.loads(output.read_text(encoding="utf-8"))["rows"]
    result["rows"] += rows
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        typer.run(main)
    except CompressKVError as error:
        raise SystemExit(f"compresskv: {error}") from error
