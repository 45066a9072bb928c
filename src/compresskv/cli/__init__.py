"""The command line. Each command imports what it needs when it runs, so that `--help` is quick.

Nothing is imported here before `main` watches for Ctrl-C.
"""

__all__ = ["main"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line: 0 on success, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    try:
        import signal  # takes a moment, too

        from compresskv.cli.app import run

        status = run()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit:  # by a signal, and all is cleaned up
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise
    _let_go(interrupted=status == INTERRUPTED)
    raise SystemExit(status)


def _let_go(*, interrupted: bool) -> None:
    """From here on Ctrl-C ends the process at once, without a traceback: also while Python cleans up."""
    import atexit
    import signal
    import sys

    if not interrupted:
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # main's caller may be no process of its own
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("compresskv: interrupted", file=sys.stderr)  # noqa: T201
