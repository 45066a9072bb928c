"""A run's JSON in its file: written as rows come, and gone on with where a run was ended early."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compresskv.bench.config import Stage
from compresskv.bench.limits import Limits
from compresskv.bench.row import Row
from compresskv.bench.run import Bench
from compresskv.errors import ConfigError
from compresskv.system.convert import convert
from compresskv.system.files import make_folder, write_text
from compresskv.system.inputs import read_json

_UNFINISHED = "unfinished"


class StoredRun:
    """What a run and the peers beside it measured, and the file that keeps it."""

    def __init__(self, run: Bench, path: Path | None, profile: Path | None) -> None:
        """Take a run that has not begun.

        Args:
            path: None: nothing is stored.
            profile: the file of the methods' profile; with another one, a stored run is not the same.
        """
        self._run = run
        self._path = path
        self._profile = None if profile is None else str(profile)
        self.peers: dict[str, list[dict[str, Any]]] = {}
        """Rows of the peers that were measured."""
        self._begun: list[dict[str, Any]] = []

    def go_on(self, stages: Sequence[Stage]) -> int:
        """Take over what an unfinished run left in the file.

        Returns: how many stages need not be measured again.
        Raises:
            ConfigError: it is a run of another model, machine, or other versions or settings.
        """
        stored = self._read()
        if stored is None:
            return 0
        try:
            rows, limits = [convert(row, Row) for row in stored["rows"]], convert(stored["limits"], Limits)
            peers, notes = dict(stored[_UNFINISHED]["peers"]), list(stored["notes"])
        except (KeyError, TypeError, ValueError):  # written by hand, or by another version
            return 0
        if not self._run.measures(rows, stages):
            raise self._of_another("methods")
        self.peers = peers
        return self._run.take_over(rows, limits, notes, stages)

    def add_peer(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Measure a peer, whose rows are stored as they come."""
        self._begun = []
        for row in rows:
            self._begun.append(row)
            self.note_rows()
        self.peers[name], self._begun = self._begun, []

    def result(self) -> dict[str, Any]:
        """For JSON: the run's, with the rows of peers."""
        peers = [row for rows in (*self.peers.values(), self._begun) for row in rows]
        return {**self._run.result(), **({"peers": peers} if peers else {})}

    def note_rows(self) -> None:
        """Store what is there of a run that is not finished; where that fails, `write` will say so at its end."""
        with suppress(ConfigError):
            self.write(self.result(), finished=False)

    def write(self, result: dict[str, Any], *, finished: bool) -> None:
        """Store a result; where the run is not finished, with what is needed to go on with it.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self._path is None:
            return
        rest = {} if finished else {_UNFINISHED: {"profile": self._profile, "peers": self.peers}}
        try:
            make_folder(self._path.parent)
            write_text(self._path, json.dumps({**result, **rest}, indent=1))
        except OSError as err:
            raise ConfigError(f"cannot be written: {err.strerror}", option="output", value=str(self._path)) from err

    def _read(self) -> dict[str, Any] | None:
        """The file's unfinished run, if it holds one."""
        try:
            stored: dict[str, Any] = read_json(self._path or Path())
            before = _kind(stored) | {"profile": stored[_UNFINISHED]["profile"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        now = _kind(self._run.result()) | {"profile": self._profile}
        others = [name for name, value in now.items() if before.get(name) != value]
        if others:
            raise self._of_another(" and ".join(others))
        return stored

    def _of_another(self, what: str) -> ConfigError:
        problem = f"holds an unfinished run with other {what}: name another file, or delete it"
        return ConfigError(problem, option="output", value=self._path)


def _kind(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for figures to be compared, by name, as JSON has it."""
    machine = {name: value for name, value in result["machine"].items() if name != "available_nbytes"}
    kind = {name: result[name] for name in ("versions", "model", "settings")} | {"machine": machine}
    return dict(json.loads(json.dumps(kind)))
