"""A benchmark's files: where they are, and their JSONL rows; errors name file and line."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from compresskv.errors import DataError, first_line
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.system.convert import convert
from compresskv.system.paths import is_file, is_folder, why_unseen

T = TypeVar("T")

Folder: TypeAlias = Path | zipfile.Path
"""A folder on disk, or one inside a zip archive."""


@dataclass(frozen=True)
class Line(Generic[T]):
    """One row of a file, and where it stands."""

    number: int
    """From 1."""
    row: T
    where: str
    """'hotpotqa.jsonl line 3'."""

    def error(self, problem: str) -> DataError:
        """An error that says where."""
        return DataError(f"{self.where}: {problem}")


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
    if not is_folder(data):
        raise DataError(
            f": {why_unseen(data) or 'no such folder'}; task {task!r} needs {needs}", option="data", value=data
        )
    inner = data / task
    return inner if is_folder(inner) else data


def existing_files(folder: Folder, files: Mapping[str, str], settings: TaskSettings) -> dict[str, str]:
    """Those of the subsets' files that exist, by subset.

    Raises:
        DataError: none exists, or one is missing whose subset was asked for by name.
    """
    found = {subset: name for subset, name in files.items() if _is_there(folder / name)}
    missing = [files[subset] for subset in settings.subsets if subset not in found]
    if missing or not found:
        raise DataError(
            f"{folder}: no {' and no '.join(missing) or 'file of any subset, such as ' + min(files.values())}"
        )
    return found


def _is_there(path: Folder) -> bool:
    return is_file(path) if isinstance(path, Path) else path.is_file()


def read_lines(folder: Folder, name: str, kind: type[T], limit: int | None = None) -> Iterator[Line[T]]:
    """The first `limit` rows of a file, or all; blank lines are passed over.

    Args:
        kind: what a row holds, as for `convert`.
    Raises:
        DataError: the file cannot be read, holds no rows, or a line is no such row.
    """
    empty = True
    for number, line in islice(_lines(folder, name), limit):
        empty = False
        where = f"{name} line {number}"
        yield Line(number, _row(where, line, kind), where)
    if empty:
        raise DataError(f"{name}: the file holds no rows")


def _lines(folder: Folder, name: str) -> Iterator[tuple[int, bytes]]:
    try:
        with (folder / name).open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (OSError, zipfile.BadZipFile) as err:
        raise DataError(f"{name}: cannot be read: {first_line(err)}") from err


def _row(where: str, line: bytes, kind: type[T]) -> T:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as err:
        raise DataError(f"{where}: not UTF-8 text") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: not valid JSON: {first_line(err)}") from err
    try:
        return convert(fields, kind)
    except ValueError as err:
        raise DataError(f"{where}: {err}") from err
