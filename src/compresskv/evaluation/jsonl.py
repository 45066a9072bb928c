"""A benchmark's files: where they are, and JSONL rows whose errors name file and line."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from compresskv.errors import DataError, first_line
from compresskv.evaluation.task import TaskSettings

Folder: TypeAlias = Path | zipfile.Path
"""A folder on disk, or one inside a zip archive."""


@dataclass(frozen=True)
class Row:
    """One object of a file, with checked access to its fields."""

    where: str
    """'hotpotqa.jsonl line 3'."""
    number: int
    """Its line, from 1."""
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that must say something."""
        value = self._required(name)
        if not isinstance(value, str):
            raise self.error(f"{name!r} is not text")
        if not value.strip():
            raise self.error(f"{name!r} is empty")
        return value

    def optional_text(self, name: str) -> str:
        """A field that may be empty, null or absent."""
        value = self.fields.get(name)
        if not isinstance(value, str | None):
            raise self.error(f"{name!r} is not text")
        return value or ""

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, at least one."""
        value = self._required(name)
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise self.error(f"{name!r} is not a list of texts")
        return tuple(value)

    def integer(self, name: str) -> int:
        """A whole number, not negative."""
        value = self._required(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"{name!r} is not a whole number of 0 or more")
        return value

    def error(self, problem: str) -> DataError:
        """An error that says where."""
        return DataError(f"{self.where}: {problem}")

    def _required(self, name: str) -> Any:
        if name not in self.fields:
            raise self.error(f"the field {name!r} is missing")
        return self.fields[name]


def task_folder(task: str, data: Path | None, needs: str) -> Path:
    """DATA/task where there is one, else DATA.

    Args:
        task: the benchmark's name.
        data: DATA.
        needs: what the folder must hold and where to get it, for the error.

    Raises:
        DataError: no folder was given, or there is none of that name.
    """
    if data is None:
        raise DataError(f": task {task!r} needs a folder with {needs}", option="data")
    if not data.is_dir():
        raise DataError(f": no such folder; task {task!r} needs {needs}", option="data", value=data)
    inner = data / task
    return inner if inner.is_dir() else data


def existing_files(folder: Folder, files: Mapping[str, str], settings: TaskSettings) -> dict[str, str]:
    """Those of the subsets' files that exist, by subset.

    Raises:
        DataError: none exists, or one is missing whose subset was asked for by name.
    """
    found = {subset: name for subset, name in files.items() if (folder / name).is_file()}
    missing = [files[subset] for subset in settings.subsets if subset not in found]
    if missing or not found:
        raise DataError(
            f"{folder}: no {' and no '.join(missing) or 'file of any subset, such as ' + min(files.values())}"
        )
    return found


def read_rows(folder: Folder, name: str, limit: int | None = None) -> Iterator[Row]:
    """The first `limit` rows of a file, or all; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, holds no rows, or a line is no JSON object.
    """
    empty = True
    for row in islice(_rows(folder, name), limit):
        empty = False
        yield row
    if empty:
        raise DataError(f"{name}: the file holds no rows")


def _rows(folder: Folder, name: str) -> Iterator[Row]:
    try:
        with (folder / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(f"{name} line {number}", number, line)
    except (OSError, zipfile.BadZipFile) as err:
        raise DataError(f"{name}: cannot be read: {first_line(err)}") from err


def _row(where: str, number: int, line: bytes) -> Row:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as err:
        raise DataError(f"{where}: not UTF-8 text") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: not valid JSON: {first_line(err)}") from err
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object")
    return Row(where, number, fields)
