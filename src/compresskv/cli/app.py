"""The `compresskv` command: its subcommands, and how its errors look."""

import contextlib
import errno
import os
import sys
from functools import partial
from typing import Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli import INTERRUPTED
from compresskv.cli.ask import ask
from compresskv.cli.bench import EPILOG as BENCH_EPILOG
from compresskv.cli.bench import bench
from compresskv.cli.catalogue import methods, models
from compresskv.cli.chat import EPILOG as CHAT_EPILOG
from compresskv.cli.chat import chat
from compresskv.cli.command import Command
from compresskv.cli.compile import EPILOG as COMPILE_EPILOG
from compresskv.cli.compile import compile_step
from compresskv.cli.encoding import escape_unwritable
from compresskv.cli.evaluate import EPILOG as EVAL_EPILOG
from compresskv.cli.evaluate import evaluate
from compresskv.cli.explain import EPILOG as EXPLAIN_EPILOG
from compresskv.cli.explain import explain
from compresskv.cli.group import CommandGroup
from compresskv.cli.profile import profile_app
from compresskv.cli.read import EPILOG as READ_EPILOG
from compresskv.cli.read import read
from compresskv.cli.report import EPILOG as REPORT_EPILOG
from compresskv.cli.report import report
from compresskv.cli.serve import CONTEXT as SERVE_CONTEXT
from compresskv.cli.serve import EPILOG as SERVE_EPILOG
from compresskv.cli.serve import serve
from compresskv.cli.session import session_app
from compresskv.cli.terminal import warnings_in_one_line
from compresskv.cli.usage import UsageError, explained, is_help
from compresskv.errors import CompressKVError
from compresskv.system.interrupts import ended_once
from compresskv.system.quiet import hush_torchao
from compresskv.version import __version__

app = typer.Typer(
    name="compresskv",
    cls=CommandGroup,
    help="Answer questions about long documents with a KV cache of a few per cent of its size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EPILOG = f"""\b
Examples:
  compresskv ask report.txt "Who signed the contract?"
  compresskv ask report.txt "Who signed the contract?" --budget 3% \\
      --compare full,snapkv
  compresskv read report.txt
  compresskv ask report.kvc "Who signed the contract?"
  compresskv chat report.kvc
  compresskv explain report.txt "Who signed the contract?" --html kept.html
  compresskv eval --tasks needle --output runs/needle
  compresskv bench --lengths 1024,4096
  compresskv compile
  compresskv serve {defaults.MODEL} --budget 5%
  compresskv methods
  compresskv profile show {defaults.MODEL}
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
  compresskv ask examples/ships_log.txt \\
      "What is the number that opens the brass lock?"
  compresskv ask log.txt "Who is the cook?" --method snapkv --budget 0.05
  compresskv ask log.txt "Who is the cook?" --compare full,streaming_llm \\
      --json
  cat log.txt | compresskv ask - "Who is the cook?" --model ./my-model \\
      --truncate middle
  compresskv ask log.kvc "Who is the cook?"
"""

METHODS_EPILOG = """\b
Examples:
  compresskv methods
  compresskv methods --json
"""
MODELS_EPILOG = """\b
Examples:
  compresskv models
  compresskv models --json
"""

_command = partial(app.command, cls=Command)
_command(epilog=ASK_EPILOG, short_help="Answer a question about a document.")(ask)
_command(epilog=READ_EPILOG, short_help="Read documents once, to be asked later.")(read)
_command(epilog=CHAT_EPILOG, short_help="Talk about a document.")(chat)
_command(epilog=METHODS_EPILOG)(methods)
_command(epilog=MODELS_EPILOG, short_help="List models that need no hub.")(models)
_command("eval", epilog=EVAL_EPILOG, short_help="Measure on benchmarks what methods lose.")(evaluate)
_command(epilog=REPORT_EPILOG, short_help="Turn benchmark runs into tables and figures.")(report)
_command(epilog=EXPLAIN_EPILOG, short_help="Show on a page which tokens are kept.")(explain)
_command(epilog=BENCH_EPILOG, short_help="Measure speed and memory.")(bench)
_command("compile", epilog=COMPILE_EPILOG, short_help="Build a model's compiled step once.")(compile_step)
_command(epilog=SERVE_EPILOG, context_settings=SERVE_CONTEXT, short_help="Serve a model by vLLM.")(serve)
app.add_typer(session_app, name="session", short_help="Show what a session holds.")
app.add_typer(profile_app, name="profile", short_help="Make, show, verify or import a profile.")


def run() -> int:
    """Run the command that was typed: the exit code, 2 after one line on stderr for what is wrong.

    Raises:
        KeyboardInterrupt: by Ctrl-C, once.
        SystemExit: the process was told to end.
    """
    hush_torchao()
    if sys.stderr is None:  # closed: what is written there is lost, and no other file takes its number
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    escape_unwritable()
    if sys.stdout is None:
        return _refused("standard output is closed: send it to a file or to /dev/null")
    status: Any = 0
    try:
        with ended_once(until_exit=True), warnings_in_one_line():
            status = app(prog_name="compresskv", standalone_mode=False)
        sys.stdout.flush()
    except CompressKVError as error:
        status = _refused(str(error))
    except UsageError as error:
        status = _show_help(error) if is_help(error) else _refused(explained(error))
    except typer.Abort:
        status = INTERRUPTED
    except OSError as error:
        if error.filename is None:
            status = _without_output(error)
        else:  # most are explained where the file is used
            status = _refused(f"{str(error.filename)!r}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        status = _refused("memory does not suffice: give a shorter text, a smaller model, or another dtype")
    return status if isinstance(status, int) else 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on a CPU or a GPU, has found no memory."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in str(error)


def _refused(message: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be full, too
        print(f"compresskv: {' '.join(message.split())}", file=sys.stderr, flush=True)  # noqa: T201
    return 2


def _show_help(error: Any) -> int:
    error.show()
    return 2


def _without_output(error: OSError) -> int:
    """Standard output cannot be written: a full disk, or a reader that went away, which is no error.

    What it still holds is dropped, for Python would fail on it once more at its end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if error.errno == errno.EPIPE else _refused(f"standard output cannot be written: {error.strerror}")
