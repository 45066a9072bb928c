"""A file of JSON lines that only grows, and that a kill at any moment leaves usable."""

import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from compresskv.system.files import make_folder, write_whole
from compresskv.system.paths import exists

T = TypeVar("T")


class JsonlLog(Generic[T]):
    """Values, one JSON line each. Each is on disk when `append` returns.

    Opening only reads. One process at a time may append: callers hold a lock from opening on.
    """

    def __init__(self, path: Path, parse: Callable[[Any], T]) -> None:
        """Read the file, if there is one. A last line that a kill cut short is left out, and so are damaged lines.

        Args:
            parse: Turns a line's JSON into a value; ValueError, KeyError or TypeError mean that it is damaged.

        Raises:
            OSError: the file cannot be read.
        """
        self._path = path
        self.values: list[T] = []
        """What the file held when it was opened."""
        self._num_damaged = 0
        kept: list[bytes] = []
        self._data = b""
        with suppress(FileNotFoundError):
            self._data = path.read_bytes()
        lines, _ = split_lines(self._data)
        for line in filter(bytes.strip, lines):
            try:
                self.values.append(parse(parse_line(line)))
                kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                self._num_damaged += 1
        self._mended: bytes | None = b"".join(kept)  # what the file is to hold before anything is appended

    def append(self, row: Any) -> None:
        """Add a line; where that fails, the file stays as it was.

        Lines that could not be read are taken out before the first one is added, with a warning that tells how many
        they were and which file keeps them.

        Raises:
            OSError: the disk is full or the file cannot be written.
            ValueError: `row` holds a NaN or an infinity, which are not JSON.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self._mend()
        size = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, size)  # half a line would spoil the next one
            raise

    def _mend(self) -> None:
        if self._mended is None:
            return
        make_folder(self._path.parent)
        self._path.touch()
        if self._num_damaged:
            backup = _unused(self._path)
            write_whole(backup, self._data)
            lines = "line" if self._num_damaged == 1 else "lines"
            told = f"{self._num_damaged} {lines} of {str(self._path)!r} cannot be read: {str(backup)!r} keeps the file"
            warnings.warn(told, stacklevel=3)
        if self._data.startswith(self._mended):
            os.truncate(self._path, len(self._mended))  # the usual case: nothing is copied
        else:
            write_whole(self._path, self._mended)
        self._mended, self._data = None, b""


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """(the lines without their ends, what was cut short after them).

    A last line that is whole JSON needs no end. Blank lines stay, so that a line's place is its number.
    """
    *lines, last = data.split(b"\n")
    try:
        parse_line(last)
    except ValueError:
        return lines, last
    return [*lines, last], b""


def parse_line(line: bytes) -> Any:
    """The JSON of a line.

    Raises:
        ValueError: it is none; NaN and infinities are none.
    """
    try:
        return json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unused(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    names = (path.with_name(f"{path.stem}.unreadable-{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not exists(name))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
