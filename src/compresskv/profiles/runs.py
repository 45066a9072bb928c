"""A log of finished runs, one JSON line each: what a killed calibration had finished, it need not measure again."""

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from compresskv.errors import ProfileError


class RunLog:
    """Results by key, kept in a file. Each is written as soon as it is known; none is kept twice."""

    def __init__(self, path: Path) -> None:
        """Open the log and read what it holds; a last line that a kill cut short is dropped, and so is a damaged one.

        Raises:
            ProfileError: the place cannot be read or written.
        """
        self._path = path
        self._results: dict[Hashable, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(path, len(whole))  # not written anew: a kill at this moment must not cost finished runs
        except OSError as error:
            raise ProfileError(f"cannot keep finished runs in {str(path)!r}: {error.strerror}") from error
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self._results[tuple(record["key"])] = record["result"]
            except (ValueError, KeyError, TypeError):  # its run is measured again
                continue

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def __getitem__(self, key: Hashable) -> Any:
        return self._results[key]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, key: tuple[str, ...], result: Any) -> None:
        """Keep a finished run.

        Raises:
            ProfileError: the disk is full or the file cannot be written; earlier runs stay.
        """
        if key in self._results:
            raise ValueError(f"run {key} is in the log already")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
        except OSError as error:
            raise ProfileError(f"cannot keep finished runs in {str(self._path)!r}: {error.strerror}") from error
        self._results[key] = result
