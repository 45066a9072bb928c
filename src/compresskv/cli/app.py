"""The `compresskv` command: its subcommands, and how its errors look."""

import sys
from typing import Annotated

import typer

from compresskv.cli.ask import ask
from compresskv.cli.bench import EPILOG as BENCH_EPILOG
from compresskv.cli.bench import bench
from compresskv.cli.catalogue import methods, models
from compresskv.cli.compile import EPILOG as COMPILE_EPILOG
from compresskv.cli.compile import compile_step
from compresskv.cli.evaluate import EPILOG as EVAL_EPILOG
from compresskv.cli.evaluate import evaluate
from compresskv.cli.explain import EPILOG as EXPLAIN_EPILOG
from compresskv.cli.explain import explain
from compresskv.cli.group import Group
from compresskv.cli.profile import profile_app
from compresskv.cli.report import EPILOG as REPORT_EPILOG
from compresskv.cli.report import report
from compresskv.cli.serve import CONTEXT as SERVE_CONTEXT
from compresskv.cli.serve import EPILOG as SERVE_EPILOG
from compresskv.cli.serve import serve
from compresskv.errors import CompressKVError
from compresskv.system.quiet import hush_torchao
from compresskv.version import __version__

app = typer.Typer(
    name="compresskv",
    cls=Group,
    help="Answer questions about long documents with a KV cache of a few per cent of its size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EPILOG = """\b
Examples:
  compresskv ask report.txt "Who signed the contract?"
  compresskv ask report.txt "Who signed the contract?" --budget 3% --compare full,snapkv
  compresskv explain report.txt "Who signed the contract?" --html kept.html
  compresskv eval --tasks needle --output runs/needle
  compresskv bench --lengths 1024,4096
  compresskv compile
  compresskv serve smollm2-135m --budget 5%
  compresskv methods
  compresskv profile show smollm2-135m
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"compresskv {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback(epilog=_EPILOG)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


ASK_EPILOG = """\b
Examples:
  compresskv ask examples/ships_log.txt "What is the number that opens the brass lock?"
  compresskv ask log.txt "Who is the cook?" --method snapkv --budget 0.05
  compresskv ask log.txt "Who is the cook?" --compare full,streaming_llm --json
  cat log.txt | compresskv ask - "Who is the cook?" --model ./my-model --truncate middle
"""

app.command(epilog=ASK_EPILOG)(ask)
app.command()(methods)
app.command()(models)
app.command("eval", epilog=EVAL_EPILOG)(evaluate)
app.command(epilog=REPORT_EPILOG)(report)
app.command(epilog=EXPLAIN_EPILOG)(explain)
app.command(epilog=BENCH_EPILOG)(bench)
app.command("compile", epilog=COMPILE_EPILOG)(compile_step)
app.command(epilog=SERVE_EPILOG, context_settings=SERVE_CONTEXT)(serve)
app.add_typer(profile_app, name="profile")


def main() -> None:
    """Run the command line: 0 on success, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    hush_torchao()
    try:
        app()
    except CompressKVError as error:
        print(f"compresskv: {' '.join(str(error).splitlines())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:
            print("compresskv: interrupted", file=sys.stderr)  # noqa: T201
        raise
