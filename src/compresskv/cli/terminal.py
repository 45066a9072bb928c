"""What the commands share when they write to a terminal: consoles, progress, numbers."""

import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Results."""
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Progress and remarks: never part of a result."""


BEGINNING = 60
"""Characters that are shown of a text that may be long."""
SILENCE_S = 20.0
"""The longest time without a word where standard error is no terminal."""


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


class _FittingTable(Table):
    """Cuts no number where a terminal is narrow: titles are broken first, then cells of several words, and in the end
    anything.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = [column for column in self.columns if column.no_wrap]
        if self._spare(console, options) < 0:
            for column in numbers:
                column.header = "\n".join(str(column.header).split())
        if self._spare(console, options) < 0:
            for column in numbers:
                column.no_wrap = False
            self._break_between_words(console, options)
        return super().__rich_console__(console, options)

    def _break_between_words(self, console: Console, options: ConsoleOptions) -> None:
        """Each column as wide as its longest word, and as far as there is room as its cells, those of numbers first."""
        spare = self._spare(console, options)
        if spare < 0:
            return
        for column in reversed(self.columns):
            sizes = _sizes(console, options, column)
            column.width = min(sizes.maximum, sizes.minimum + spare)
            spare -= column.width - sizes.minimum

    def _spare(self, console: Console, options: ConsoleOptions) -> int:
        """Characters that are left of a line; negative where too much must stand in it."""
        sizes = [_sizes(console, options, column) for column in self.columns]
        widths = [
            own.maximum if column.no_wrap else own.minimum for column, own in zip(self.columns, sizes, strict=True)
        ]
        between = 3 * len(widths) - 1
        return options.max_width - sum(widths) - between


def _sizes(console: Console, options: ConsoleOptions, column: Column) -> Measurement:
    """Of the longest word and of the longest line in a column. Where lines may be broken, so may the title's word."""
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    title = Measurement.get(console, options, column.header)
    longest = max(cell.maximum for cell in (title, *cells))
    least = [cell.minimum for cell in ((title, *cells) if column.no_wrap or not cells else cells)]
    return Measurement(max(least), longest)


def new_table(*columns: str, numbers: Collection[str] = (), title: str | None = None) -> Table:
    """The look of all tables.

    Args:
        columns: their titles.
        numbers: those to be aligned on the right, in one line.
    """
    table = _FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def beginning(text: str) -> str:
    """Its first characters, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= BEGINNING else f"{line[: BEGINNING - 3].rstrip()}..."


def counted(number: int, noun: str) -> str:
    """'1 run', '2 runs', '1,024 runs'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class Bar:
    """A progress bar on stderr that vanishes when it stops; where stderr is no terminal, a line now and then."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self._progress.add_task("", total=None)
        self._lines = None if err.is_terminal else _Lines()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, message: str, fraction: float | None) -> None:
        """Show what is being done, and how much of it is done where that is known (0 to 1)."""
        if self._lines is not None:
            self._lines.now(message, fraction)
            return
        total = None if fraction is None else 1.0
        if self._progress.tasks[0].description != message:
            self._progress.reset(self._task, description=message, total=total)
        self._progress.update(self._task, total=total, completed=fraction or 0.0)

    def stop(self) -> None:
        """Take the bar away, for good."""
        self._progress.stop()
        if self._lines is not None:
            self._lines.stop()
            self._lines = None


class _Lines:
    """What is being done, on a line every `SILENCE_S`: also where nothing is reported for longer."""

    def __init__(self) -> None:
        self._doing: tuple[str, float | None] | None = None
        self._start = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def now(self, message: str, fraction: float | None) -> None:
        if self._doing is None:
            self._thread.start()
        self._doing = message, fraction

    def stop(self) -> None:
        self._stopped.set()

    def _tell(self) -> None:
        while not self._stopped.wait(SILENCE_S):
            if self._doing is not None:
                message, fraction = self._doing
                share = "" if fraction is None else f", {fraction:.0%}"
                err.print(f"{message}{share} ({time.monotonic() - self._start:.0f} s)")


class Steps:
    """Progress of one answer: the prompt by layers, then the answer by tokens."""

    def __init__(self, bar: Bar, name: str, max_new_tokens: int) -> None:
        self._bar = bar
        self._name = name
        self._most = max_new_tokens
        self._num_tokens = 0

    def reading(self, done: int, layers: int) -> None:
        """So many layers have read the prompt."""
        self._bar(f"{self._name}: reading", done / layers)

    def answering(self, _token: int) -> None:
        """One more token has come."""
        self._num_tokens += 1
        self._bar(f"{self._name}: answering", self._num_tokens / self._most)


class Stream(AbstractContextManager["Stream"]):
    """Writes an answer as it comes; the progress bar makes way first. Its line ends, however the answer does."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._started = False

    def __call__(self, text: str) -> None:
        """Some more of it."""
        self._bar.stop()
        self._started = True
        sys.stdout.write(text)
        sys.stdout.flush()

    def __exit__(self, *_: object) -> None:
        if self._started:
            sys.stdout.write("\n")
            sys.stdout.flush()


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
