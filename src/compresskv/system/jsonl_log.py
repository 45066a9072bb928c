"""A file of JSON lines that only grows, and that a kill at any moment leaves usable."""

import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")


class JsonlLog(Generic[T]):
    """Values, one JSON line each. Each is on disk when `append` returns."""

    def __init__(self, path: Path, parse: Callable[[Any], T]) -> None:
        """Open the file, or make it. A last line that a kill cut short is cut off, and damaged lines are taken out.

        Args:
            path: Folders above it are made.
            parse: Turns a line's JSON into a value; ValueError, KeyError or TypeError mean that it is damaged.

        Raises:
            OSError: the place cannot be read or written.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        data = path.read_bytes()
        kept: list[bytes] = []
        self.values: list[T] = []
        """What the file held when it was opened."""
        for line in whole_lines(data):
            with suppress(ValueError, KeyError, TypeError):
                self.values.append(parse(parse_line(line)))
                kept.append(line + b"\n")
        _replace(path, data, b"".join(kept))

    def append(self, row: Any) -> None:
        """Add a line; where that fails, the file stays as it was.

        Raises:
            OSError: the disk is full or the file cannot be written.
            ValueError: `row` holds a NaN or an infinity, which are not JSON.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
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


def whole_lines(data: bytes) -> list[bytes]:
    """The lines that end, without their ends: what follows the last line end was cut short."""
    return data.split(b"\n")[:-1]


def parse_line(line: bytes) -> Any:
    """The JSON of a line.

    Raises:
        ValueError: it is none; NaN and infinities are none.
    """
    try:
        return json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write atomically: a reader sees the old file or the new one, even after a power cut.

    Raises:
        OSError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # tempfile's would be unreadable to others
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(path: Path, old: bytes, new: bytes) -> None:
    if new == old:
        return
    if old.startswith(new):
        os.truncate(path, len(new))  # the usual case: nothing is copied
    else:
        write_whole(path, new)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
