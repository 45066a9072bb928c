"""`compresskv bench`: what caches cost and save, beside plain transformers and the machine's limits."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.bench_table import print_result
from compresskv.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ProfileOption,
    budget_help,
    check_profile,
    check_timed,
    parse_numbers,
    split_names,
)
from compresskv.cli.outputs import check_outputs, check_writable
from compresskv.cli.terminal import Bar, err, out
from compresskv.errors import ConfigError
from compresskv.selection.budget_words import BEFOREHAND
from compresskv.selection.precision import NATIVE, PRECISIONS

if TYPE_CHECKING:
    from compresskv.bench.config import BenchConfig
    from compresskv.bench.run import Bench
    from compresskv.bench.stored import StoredRun
    from compresskv.bench.subject import Subject
    from compresskv.methods.base import Method

EPILOG = """\b
Examples:
  compresskv bench --lengths 1024,4096 --budgets 128,256
  compresskv bench --methods snapkv,adakv --budgets 256,3%,full --json
  compresskv bench --lengths 4096 --budgets 6MB --stores native,int4
  compresskv bench --random llama-1b --lengths 4096,16384,32768 \\
      --plot growth.png
  compresskv bench --random llama-8b --layers 4 --dtype float32
  compresskv bench --lengths 4096 --budgets 256 --decode eager,compiled,int8
  compresskv bench --lengths 4096 --peers kvpress,vllm,llama.cpp \\
      -o runs/speed.json

Measure on a quiet machine: figures of a busy one differ, ratios less so. What each figure means: docs/speed.md.
"""


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"Hub id, folder, .gguf file. Default: the embedded {defaults.MODEL}.",
            metavar="MODEL",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens. Default: those of 1024,4096,8192 that fit the model.", metavar="LENGTHS"
        ),
    ] = None,
    budgets: Annotated[
        str,
        typer.Option(
            help=f"{budget_help(*BEFOREHAND, 'full, all of it')}; several, separated by commas.", metavar="BUDGETS"
        ),
    ] = "128,256,full",
    methods: Annotated[
        str, typer.Option(help="See 'compresskv methods'; with options: snapkv[window_size=32].", metavar="METHODS")
    ] = f"snapkv,{defaults.METHOD}",
    random: Annotated[
        str | None,
        typer.Option(
            help="A geometry with random weights instead of a model, for any length: smollm2-135m, qwen2.5-0.5b, "
            "qwen3-0.6b, llama-1b, llama-3b, mistral-7b, llama-8b, tiny.",
            metavar="GEOMETRY",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Layers of the --random model. Default: its own, or what memory holds.", metavar="N"),
    ] = None,
    decode: Annotated[
        str,
        typer.Option(
            help="How tokens are generated after eviction: 'eager', 'compiled', 'int8' (compiled, with 8-bit weights).",
            metavar="WAYS",
        ),
    ] = "eager",
    stores: Annotated[
        str,
        typer.Option(
            help=f"In how many bits a number what is kept is held: {', '.join(PRECISIONS)}.", metavar="STORES"
        ),
    ] = NATIVE,
    repeats: Annotated[int, typer.Option(help="Rounds in which all take turns.", metavar="N")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after each prompt.", metavar="TOKENS")] = 33,
    peers: Annotated[
        str, typer.Option(help="Other libraries to measure: kvpress, vllm, llama.cpp.", metavar="LIBRARIES")
    ] = "",
    plot: Annotated[str | None, typer.Option(help="Draw latency and memory against length.", metavar="FILE")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the JSON to a file, too, as it is measured; a run that was ended early goes on from there.",
            metavar="FILE",
        ),
    ] = None,
    profile: ProfileOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill, scoring, decoding and memory, beside plain transformers and what the machine allows.

    Ratios to plain transformers are taken within rounds in which all take turns.
    """
    config, chosen = _config(lengths, budgets, methods, decode, stores, repeats, new_tokens)
    _check_choices(model, random, layers, profile, dtype, config.decode)
    check_outputs({"plot": plot, "output": output}, {"profile": profile, "model": model})
    check_profile(profile)
    figure, place = _places(plot, output)
    peer_pythons = _pythons_of_peers(peers, random or model or defaults.MODEL, random=random is not None)
    with Bar() as bar:
        subject = _subject(model, random, layers, config, dtype, device, bar)
        if random is None:
            from compresskv.prompts.prompt import context_length

            asked, config = config, config.fitted(context_length(subject.model), strict=lengths is not None)
            subject.notes += asked.changes(config)
        stages = _stages(subject, config, chosen, profile)
        from compresskv.bench.run import Bench
        from compresskv.bench.stored import StoredRun
        from compresskv.system.interrupts import interrupted_once

        run = Bench(subject, config)
        stored = StoredRun(run, place, profile)
        if measured := stored.go_on(stages):
            err.print(f"going on with {place}: {measured} of {len(stages)} prompt lengths were measured before")
        finished = False
        with interrupted_once():
            try:
                run.run(stages, bar, on_rows=stored.note_rows)
                _measure_peers(peer_pythons, run, stored, bar)
                finished = True
            finally:  # on Ctrl-C, what was measured is shown
                bar.stop()
                _report(stored, figure, place, finished=finished, as_json=as_json)


def _config(
    lengths: str | None, budgets: str, methods: str, decode: str, stores: str, repeats: int, new_tokens: int
) -> "tuple[BenchConfig, dict[str, Method]]":
    from compresskv.bench.config import DEFAULT_LENGTHS, BenchConfig, parse_bench_budgets
    from compresskv.methods.registry import parse_methods

    given = parse_numbers("lengths", lengths, int)
    counts, has_full = parse_bench_budgets(budgets)
    config = BenchConfig(
        lengths=DEFAULT_LENGTHS if given is None else tuple(dict.fromkeys(given)),
        budgets=counts,
        has_full=has_full,
        repeats=repeats,
        new_tokens=new_tokens,
        decode=tuple(dict.fromkeys(way.strip() for way in decode.split(",") if way.strip())),
        stores=tuple(dict.fromkeys(split_names(stores))),
    )
    if "int8" in config.decode:
        from compresskv.models.quantize import check_int8

        check_int8("decode")
    chosen = parse_methods("methods", methods)
    for method in chosen.values():
        check_timed("methods", method)
    return config, chosen


def _check_choices(
    model: str | None,
    random: str | None,
    layers: int | None,
    profile: Path | None,
    dtype: str | None,
    ways: tuple[str, ...],
) -> None:
    """Refuse options that contradict each other, before anything heavy is done."""
    if dtype == "int8" and (random is not None or "int8" in ways):
        problem = "measures a real model whose weights are quantised already: use decode=int8"
        raise ConfigError(problem, option="dtype", value=dtype)
    if random is None:
        if layers is not None:
            raise ConfigError("needs random=GEOMETRY: a real model has its own layers", option="layers", value=layers)
        return
    for option, value in (("model", model), ("profile", profile)):
        if value is not None:
            raise ConfigError(f"and random={random!r} exclude each other", option=option, value=value)
    from compresskv.bench.geometry import find_geometry

    find_geometry(random)


def _places(plot: str | None, output: str | None) -> tuple[Path | None, Path | None]:
    """The figure's file, and the result's."""
    figure = None if plot is None else check_writable("plot", plot)
    place = None if output is None else check_writable("output", output, kind="JSON")
    if figure is not None:
        from compresskv.bench.figure import check_drawable

        check_drawable(figure)
    return figure, place


def _pythons_of_peers(peers: str, model: str, *, random: bool) -> dict[str, Path]:
    """Looked for before anything is computed."""
    if not peers.strip():
        return {}
    from compresskv.bench.peers import PEERS, find_peer
    from compresskv.evaluation.configurations import parse_names

    names = parse_names("peers", peers, tuple(PEERS))
    return {name: find_peer(name, model, random=random) for name in names}


def _subject(
    model: str | None,
    random: str | None,
    layers: int | None,
    config: "BenchConfig",
    dtype: str | None,
    device: str | None,
    bar: Bar,
) -> "Subject":
    from compresskv.bench.subject import random_subject, real_subject

    if random is None:
        return real_subject(model or defaults.MODEL, dtype=dtype, device=device, on_progress=bar)
    bar(f"building {random}", None)
    return random_subject(random, layers, config.most_tokens, dtype=dtype, device=device)


def _stages(subject: "Subject", config: "BenchConfig", methods: "dict[str, Method]", profile: Path | None) -> list[Any]:
    """All profiles are found before the first prefill; a random model is given a random one."""
    from compresskv.bench.config import our_stages
    from compresskv.bench.geometry import random_profile
    from compresskv.methods.prepare import prepare_method

    own: Any = profile
    if subject.random and any(method.needs_profile for method in methods.values()):
        own = random_profile(subject.model)
        subject.notes.append("the profile is random, too: it costs what a measured one costs")
    prepared = {
        label: prepare_method(subject.model, method, own if method.needs_profile else None)
        for label, method in methods.items()
    }
    return our_stages(config, prepared, subject.int8_model)


def _measure_peers(pythons: dict[str, Path], run: "Bench", stored: "StoredRun", bar: Bar) -> None:
    for name, python in pythons.items():
        from compresskv.bench.peers import measure_peer

        if name not in stored.peers:
            plain = [row for row in run.rows if row.engine == "transformers"]
            stored.add_peer(name, measure_peer(name, python, run.subject, run.config, plain, bar))


def _report(stored: "StoredRun", plot: Path | None, output: Path | None, *, finished: bool, as_json: bool) -> None:
    result = stored.result()
    if not result["rows"]:
        return
    if as_json:
        out.print_json(json.dumps(result))
    else:
        print_result(result)
    stored.write(result, finished=finished)
    if output is not None:
        err.print(f"result: {output}")
    if plot is not None:
        from compresskv.bench.figure import draw_run

        draw_run(result, plot)
        err.print(f"figure: {plot}")
