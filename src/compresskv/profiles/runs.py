"""A log of finished runs, one JSON line each: what a killed calibration had finished, it need not measure again."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from compresskv.errors import ProfileError


class RunLog:
    """Results by key, kept in a file. Each is written as soon as it is known; none is kept twice."""

    def __init__(self, path: Path) -> None:
        """Open the log and read what it holds; a last line that a kill cut short is dropped.

        Raises:
            ProfileError: the place cannot be read or written.
        """
        self._path = path
        self._results: dict[Hashable, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            path.touch()
        except OSError as error:
            raise ProfileError(f"cannot keep finished runs in {str(path)!r}: {error.strerror}") from error
        for line in whole.splitlines():
            record = json.loads(line)
            self._results[tuple(record["key"])] = record["result"]

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
