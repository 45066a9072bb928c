"""The file of results: what all rows have in common, then a row a line. Measuring goes on where it ended."""

import datetime
import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compresskv.errors import ConfigError
from compresskv.system.jsonl_log import JsonlLog

_RUN, _SETTINGS = "run", "settings"


class Results:
    """Rows that were measured with the same settings, in one run or in several that went on with it."""

    def __init__(self, path: Path, settings: Mapping[str, Any] | None) -> None:
        """Open the file, or make it.

        Args:
            settings: what all rows have in common; None: whatever the file says.
        Raises:
            ConfigError: its rows were measured with other settings, or it is no such file.
        """
        if settings is None and not path.is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            log: JsonlLog[dict[str, Any]] = JsonlLog(path, dict)
        except OSError as error:
            raise ConfigError(f"--output {path}: {error.strerror}") from error
        if not log.values:
            if settings is None:
                raise ConfigError(f"{path} holds no results")
            log.append({_SETTINGS: settings})
            log.values.append({_SETTINGS: dict(settings)})
        head, *self.rows = log.values
        if _SETTINGS not in head:
            raise ConfigError(f"{path} does not begin with the settings of a run: give another file")
        self.settings: dict[str, Any] = head[_SETTINGS]
        other = [name for name, value in (settings or {}).items() if self.settings.get(name) != value]
        if other:
            raise ConfigError(
                f"--output {path} holds rows with {_named(self.settings, other)}, not {_named(settings or {}, other)}: "
                "give another file"
            )
        self._log = log
        self._run = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}-{uuid.uuid4().hex[:6]}"

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a row says the same in all fields of `key`."""
        return any(key.items() <= {name: row.get(name) for name in key}.items() for row in self.rows)

    def missing(self, rounds: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
        """What is still to be measured.

        Args:
            rounds: keys, of which the first of each round is what the others are compared with. Where another is
                missing, the first is measured again with it: an earlier run's would not do.
        """
        missing: list[Mapping[str, Any]] = []
        for first, *others in rounds:
            left = [key for key in others if not self.has(key)]
            missing += [first, *left] if left or not self.has(first) else []
        return missing

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Add a row."""
        whole = {**key, **row, _RUN: self._run}
        self._log.append(whole)
        self.rows.append(whole)


def source_digest(folder: Path) -> str:
    """Of a package's code: a version says too little of code that is being changed."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:12]


def _named(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={settings.get(name)!r}" for name in names)
