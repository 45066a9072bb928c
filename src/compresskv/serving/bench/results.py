"""The file of results: what all rows have in common, then a row a line. Measuring goes on where it ended."""

import datetime
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskv.errors import ConfigError
from compresskv.jsonl_log import JsonlLog

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

    def add(self, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Add the row of a key that the file has not."""
        whole = {**key, **row, _RUN: self._run}
        self._log.append(whole)
        self.rows.append(whole)


def _named(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={settings.get(name)!r}" for name in names)
