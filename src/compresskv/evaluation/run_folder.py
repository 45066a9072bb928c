"""The folder of a run: what it was begun with, and its records, which go on being added."""

import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from compresskv.errors import DataError
from compresskv.evaluation.records import Record
from compresskv.system.files import make_folder, write_text
from compresskv.system.inputs import read_bytes
from compresskv.system.jsonl_log import JsonlLog, parse_line, split_lines
from compresskv.system.paths import exists, why_unseen

_BEGUN_WITH = "run.json"
_RECORDS = "records.jsonl"


class RecordLog:
    """The records of one run, in a folder. A killed run goes on with what its folder holds.

    The folder is this process's alone until `close`, or until the end of a `with`.
    """

    def __init__(self, folder: Path, begun_with: dict[str, Any]) -> None:
        """Open a run, or make it. A record that a kill cut short is left out, and so is a damaged one.

        The file that holds damaged records is kept under another name, with a warning, before `add` writes to it.

        Args:
            folder: holds run.json and records.jsonl.
            begun_with: what must not change within a run, JSON values only.

        Raises:
            DataError: the folder belongs to a run that was begun with something else, or to another process at this
                moment, or cannot be read or written.
        """
        self._folder = folder
        self._lock = FileLock(folder / "run.lock")
        try:
            make_folder(folder)
            self._lock.acquire(timeout=0)
        except Timeout:
            problem = "is in use by another process: wait for it, or give another folder"
            raise DataError(problem, option="output", value=str(folder)) from None
        except OSError as error:
            raise self._error(error) from error
        try:
            self._claim(begun_with)
            self._log = JsonlLog(folder / _RECORDS, Record.from_dict)
        except OSError as error:
            self.close()
            raise self._error(error) from error
        except BaseException:
            self.close()
            raise
        self._records = {record.key: record for record in self._log.values}
        self._prompts = {(record.task, record.example): record.prompt_sha256 for record in self._log.values}

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._folder

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open the run."""
        self._lock.release()

    def has(self, task: str, example: str, config: str) -> bool:
        """Whether the run holds a record of that example and configuration (`Record.config`)."""
        return (task, example, config) in self._records

    def check_prompt(self, task: str, example: str, prompt_sha256: str) -> None:
        """Refuse to add to a case whose prompt has changed.

        Raises:
            DataError: naming the case.
        """
        known = self._prompts.setdefault((task, example), prompt_sha256)
        if known != prompt_sha256:
            raise DataError(
                f"{task} {example} was another prompt when {str(self._folder)!r} was made: its data, haystack or "
                "tokenizer has changed; give another output folder"
            )

    def add(self, record: Record) -> None:
        """Keep a record: it is on disk when this returns.

        Raises:
            DataError: the disk is full or the file cannot be written; earlier records stay.
            ValueError: it is in the run already, or holds a NaN or an infinity.
        """
        if record.key in self._records:
            raise ValueError(f"record {record.key} is in the run already")
        try:
            self._log.append(msgspec.structs.asdict(record))
        except OSError as error:
            raise self._error(error) from error
        self._records[record.key] = record

    def records(self) -> list[Record]:
        """All records, in the order in which they were added."""
        return list(self._records.values())

    def _claim(self, begun_with: dict[str, Any]) -> None:
        """Compare with run.json, or write it."""
        if not _compare(self._folder, begun_with, is_whole=True):
            write_text(self._folder / _BEGUN_WITH, json.dumps(begun_with, indent=1, allow_nan=False) + "\n")

    def _error(self, error: OSError) -> DataError:
        return _unusable(self._folder, error)


def check_run(folder: Path, known: dict[str, Any]) -> None:
    """Refuse a folder that belongs to another run. Nothing is made or locked.

    Args:
        known: what is known so far of what the run is begun with, JSON values only.
    Raises:
        DataError: as `RecordLog` does.
    """
    try:
        _compare(folder, known, is_whole=False)
    except OSError as error:
        raise _unusable(folder, error) from error


def _compare(folder: Path, begun_with: dict[str, Any], *, is_whole: bool) -> bool:
    """Whether the folder holds a run, begun with the same; what that one lacks counts if it `is_whole`."""
    path, records = folder / _BEGUN_WITH, folder / _RECORDS
    if (why := why_unseen(path)) is not None:
        raise DataError(f"cannot keep records: {why}", option="output", value=str(folder))
    if not exists(path):
        if exists(records) and records.stat().st_size:
            problem = f"has {_RECORDS} but no {_BEGUN_WITH}: give another folder"
            raise DataError(problem, option="output", value=str(folder))
        return False
    old, new = _read_begun_with(path), json.loads(json.dumps(begun_with, allow_nan=False))
    difference = _difference(old, new if is_whole else {**old, **new})
    if difference is not None:
        option, before, after = difference
        problem = f"was made with {option}={_told(before)}, not {_told(after)}: give another folder"
        raise DataError(problem, option="output", value=str(folder))
    return True


def _unusable(folder: Path, error: OSError) -> DataError:
    return DataError(f"cannot keep records: {error.strerror}", option="output", value=str(folder))


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """What a run was begun with, and its records; a last line that a kill cut short is left out, with a warning.

    Raises:
        DataError: the folder holds no run, or a malformed one; the message names file and line.
    """
    path = folder / _RECORDS
    try:
        begun_with = _read_begun_with(folder / _BEGUN_WITH)
        lines, torn = split_lines(path.read_bytes() if exists(path) else b"")  # nothing was measured yet
    except OSError as error:
        raise DataError(f"{str(folder)!r} holds no run: cannot read {error.filename!r}: {error.strerror}") from error
    if torn:
        warnings.warn(f"{path}: its last line was cut short and is left out", stacklevel=2)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(Record.from_dict(parse_line(line)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return begun_with, records


def _read_begun_with(path: Path) -> dict[str, Any]:
    try:
        begun_with = parse_line(read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(begun_with, dict):
        raise DataError(f"{path}: not an object")
    return begun_with


def _difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that differs, with both values. An option that is not there counts as null."""
    for option in [*new, *(option for option in old if option not in new)]:
        before, after = old.get(option), new.get(option)
        if isinstance(before, dict) and isinstance(after, dict):
            deeper = _difference(before, after)
            if deeper is not None:
                return f"{option}.{deeper[0]}", deeper[1], deeper[2]
        elif json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):  # 1, 1.0 and true differ
            return option, before, after
    return None


def _told(value: Any) -> str:
    """A value of run.json as it is typed: 1024,2048; a slice as 1::2."""
    if value in (None, []):
        return "none"
    if isinstance(value, list):
        separator = ":" if None in value else ","
        return separator.join("" if one is None else str(one) for one in value)
    return json.dumps(value)
