"""What the commands share when they write to a terminal: consoles, progress, numbers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Results."""
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Progress and remarks: never part of a result."""


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Let warnings of this package look like its errors; those of others stay as they are."""
    package = Path(__file__).parents[1]
    with warnings.catch_warnings():
        default = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if Path(filename).is_relative_to(package):
                err.print(f"compresskv: {' '.join(str(message).split())}")
            else:
                default(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


class Bar:
    """A progress bar on stderr that vanishes when it stops; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, message: str, fraction: float | None) -> None:
        """Show what is being done, and how much of it is done where that is known (0 to 1)."""
        total = None if fraction is None else 1.0
        if self._progress.tasks[0].description != message:
            self._progress.reset(self._task, description=message, total=total)
        self._progress.update(self._task, total=total, completed=fraction or 0.0)

    def stop(self) -> None:
        """Take the bar away, for good."""
        self._progress.stop()


class Building:
    """Says, also where no bar is seen, why it takes long: a step is being compiled. The bar shows it meanwhile."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._told = ""
        self.begun = False
        """Whether anything had to be compiled."""

    def __call__(self, message: str, fraction: float | None) -> None:
        """What compiling reports."""
        if message != self._told:
            self._told = message
            self.begun |= message.startswith("compiling")
            err.print(f"{message}: about a minute")
        self._bar(message, fraction)


def megabytes(nbytes: int) -> str:
    """Bytes as MB (10^6), with one decimal below 100."""
    return f"{nbytes / 1e6:.1f}" if nbytes < 100e6 else f"{nbytes / 1e6:,.0f}"
