"""`scripts/bench-serving`: measure what is asked for, go on with a file of results, and show what it holds."""

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import compresskv
from benchmarks.serving.load import Load
from benchmarks.serving.results import Results, source_digest
from compresskv.bench.machine import machine
from compresskv.cli.options import parse_numbers
from compresskv.cli.terminal import err
from compresskv.errors import CompressKVError, ConfigError
from compresskv.methods.options import parse_settings
from compresskv.serving.versions import installed_version

_MARGIN = 8  # tokens beyond a needle's prompt, which its answer may need

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", help="Results, a line each; what the file holds already is not measured again."),
]
ModelOption = Annotated[str, typer.Option(help="Folder, hub id, or the embedded smollm2-135m.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")]
CacheDtypeOption = Annotated[
    str,
    typer.Option(help="vLLM's option: auto, or fp8 for half of bfloat16's bytes (a pool of as many: --pools 6 for 3)."),
]
CachingOption = Annotated[bool, typer.Option(help="vLLM's prefix caching, which is on by default there.")]
BudgetsOption = Annotated[str, typer.Option(help="Tokens kept of each prompt. Plain vLLM is measured beside them.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another setting of the plugin's, such as chunk_budget=512.", metavar="NAME=VALUE"),
]
LengthsOption = Annotated[str, typer.Option(help="Prompt lengths in tokens.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw all loads of the file.", metavar="FILE.png")]


@app.command()
def load(
    output: OutputOption,
    lengths: LengthsOption = "1000",
    budgets: BudgetsOption = "64,128,256,512",
    pools: Annotated[str, typer.Option(help="Sizes of the pool, in whole requests; each with each length.")] = "3,6,12",
    requests: Annotated[int, typer.Option(help="Requests that are there from the beginning.")] = 12,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each.")] = 120,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 1,
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: CacheDtypeOption = "auto",
    prefix_caching: CachingOption = True,
    plot: PlotOption = None,
    settings: SettingsOption = None,
) -> None:
    """Many requests in a small pool: at each length, pool and budget."""
    from benchmarks.serving.load import run_load

    sizes = [
        Load(length, pool, requests, new_tokens)
        for length, pool in product(_numbers("--lengths", lengths), _numbers("--pools", pools))
    ]
    if min(size.pool for size in sizes) < 2:
        raise ConfigError(f"--pools {pools}: a pool of one request has no room for the blocks that a cut needs")
    kept = (None, *_numbers("--budgets", budgets))
    keys = [
        [{"kind": "load", **vars(size), "budget": budget, "round": number} for budget in kept]
        for size, number in product(sizes, range(1, rounds + 1))
    ]
    own = parse_settings("settings", settings or [])
    results = Results(output, common_settings(model, dtype, prefix_caching, own, kv_cache_dtype))
    missing = results.missing(keys)
    if missing:
        longest = max(size.length for size in sizes) + new_tokens
        most = max(size.num_blocks for size in sizes)
        engines, text = _engines(model, dtype, kv_cache_dtype, prefix_caching, longest, most, own)
        small = replace(min(sizes, key=lambda size: size.num_blocks), num_requests=2, new_tokens=4)
        for engine, budget in zip(engines, kept[:2], strict=True):
            run_load(engine, small, text, budget)  # warms up
    for key in missing:
        size = Load(key["length"], key["pool"], requests, new_tokens)
        budget = key["budget"]
        results.add(key, run_load(engines[budget is not None], size, text, budget))
        row = results.rows[-1]
        err.print(f"{size}, budget {budget}: {row['wall_s']:.1f} s, {row['tokens_per_s']:.1f} tokens/s")
    _show(results, ("load",), plot)


@app.command()
def single(
    output: OutputOption,
    lengths: LengthsOption = "7680",
    budgets: BudgetsOption = "256",
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 3,
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: CacheDtypeOption = "auto",
    prefix_caching: CachingOption = True,
    settings: SettingsOption = None,
) -> None:
    """One request alone: eviction's share of its prefill, and decoding beside that after a prompt of BUDGET tokens."""
    own = list(product(_numbers("--lengths", lengths), _numbers("--budgets", budgets)))
    others = parse_settings("settings", settings or [])
    results = Results(output, common_settings(model, dtype, prefix_caching, others, kv_cache_dtype))
    keys = [
        {"kind": "single", "length": length, "budget": budget, "round": number}
        for number, (length, budget) in product(range(1, rounds + 1), own)
    ]
    missing = [key for key in keys if not results.has(key)]
    if missing:
        from benchmarks.serving.single import run_round

        longest = max(length for length, _ in own) + 64
        engines, text = _engines(model, dtype, kv_cache_dtype, prefix_caching, longest, None, others)
        for length, budget in dict.fromkeys((key["length"], key["budget"]) for key in missing):
            run_round(engines[0], engines[1], text, length, budget, 0)  # warms up
    for key in missing:
        results.add(key, run_round(engines[0], engines[1], text, key["length"], key["budget"], key["round"]))
        err.print(str(results.rows[-1]))
    _show(results, ("single",))


@app.command()
def quality(
    output: OutputOption,
    lengths: LengthsOption = "1024,4096",
    budgets: BudgetsOption = "128,256",
    depths: Annotated[str, typer.Option(help="Where the needle lies, in per cent of the text.")] = "0,25,50,75,100",
    needles: Annotated[int, typer.Option(help="Needles at each length and depth.")] = 5,
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: CacheDtypeOption = "auto",
    prefix_caching: CachingOption = True,
) -> None:
    """Needles asked through the OpenAI API, of a server without the plugin and of one with it."""
    from benchmarks.serving import quality as grid

    results = Results(output, common_settings(model, dtype, prefix_caching, kv_cache_dtype=kv_cache_dtype))
    places = _numbers("--depths", depths, float)
    examples = grid.needles(_tokenizer(_folder(model)), _numbers("--lengths", lengths), places, needles)
    cases = {example.id: example for example in examples}
    for compressed, own in ((False, (None,)), (True, _numbers("--budgets", budgets))):
        # needle by needle: with prefix caching, its prompt is then read once for all budgets
        keys = [
            {"kind": "quality", "length": example.meta["length"], "case": name, "budget": budget}
            for (name, example), budget in product(cases.items(), own)
        ]
        missing = [key for key in keys if not results.has(key)]
        if not missing:
            continue
        most = max(_numbers("--lengths", lengths)) + _MARGIN
        options: dict[str, Any] = {"max_model_len": most, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
        options["prefix_caching"] = prefix_caching
        with grid.server(_folder(model), compressed=compressed, **options) as address:
            for key in missing:
                results.add(key, grid.ask(address, cases[key["case"]], key["budget"]))
        err.print(f"{len(missing)} answers of {'CompressKV' if compressed else 'plain vLLM'}")
    _show(results, ("quality",))


@app.command()
def report(output: Annotated[Path, typer.Argument(help="A file of results.")], plot: PlotOption = None) -> None:
    """Show what a file of results holds, measuring nothing."""
    _show(Results(output, None), ("load", "single", "quality"), plot)


def _numbers(option: str, text: str, kind: type = int) -> tuple[Any, ...]:
    return parse_numbers(option, text, kind) or ()


def _folder(model: str) -> str:
    from compresskv.models.embedded import EMBEDDED, ensure_embedded

    return str(ensure_embedded(model)) if model in EMBEDDED else model


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _engines(
    model: str,
    dtype: str,
    kv_cache_dtype: str,
    prefix_caching: bool,
    max_model_len: int,
    num_blocks: int | None,
    settings: Mapping[str, Any],
) -> tuple[list[Any], list[int]]:
    """Plain vLLM and CompressKV, and the calibration text in tokens."""
    from compresskv.calibration.haystack import read_haystack
    from compresskv.peers.engines import start_engine

    folder = _folder(model)
    text: list[int] = _tokenizer(folder)("\n\n".join(read_haystack(())), verbose=False)["input_ids"]
    size: dict[str, Any] = {"max_model_len": max_model_len, "num_blocks": num_blocks}
    size |= {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
    return [
        start_engine(folder, compressed=ours, prefix_caching=prefix_caching, settings=settings, **size)
        for ours in (False, True)
    ], text


def common_settings(
    model: str,
    dtype: str,
    prefix_caching: bool,
    settings: Mapping[str, Any] | None = None,
    kv_cache_dtype: str = "auto",
) -> dict[str, Any]:
    """What all rows of a file have in common.

    Args:
        settings: of the plugin, beside budgets.
    """
    import torch

    names = ("compresskv", "torch", "transformers")
    own = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "model": model,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "prefix_caching": prefix_caching,
        **({"settings": dict(settings)} if settings else {}),
        "machine": {name: own[name] for name in ("device", "processor", "cores", "system")},
        "versions": {name: version(name) for name in names}
        | {"vllm": installed_version(), "python": platform.python_version()},
        "source": source_digest(Path(str(compresskv.__file__)).parent),
    }


def _show(results: Results, kinds: Sequence[str], plot: Path | None = None) -> None:
    """The rows of these kinds, in tables."""
    from benchmarks.serving.tables import tables

    own = [row for row in results.rows if row["kind"] in kinds]
    err.print(f"{len(own)} rows of {len({row['run'] for row in own})} runs: {results.settings}")
    wide = Console(width=200, highlight=False)  # lines of a document, whatever the terminal's width
    for table in tables(own):
        wide.print(table)
    if plot is not None:
        from benchmarks.serving.figure import draw_loads

        draw_loads(own, plot)


if __name__ == "__main__":
    try:
        app()
    except CompressKVError as error:
        err.print(f"compresskv: {error}")
        sys.exit(2)
