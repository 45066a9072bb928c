"""A log of finished runs, one JSON line each: what a killed calibration had finished, it need not measure again."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compresskv.errors import ProfileError
from compresskv.system.files import make_folder, try_place
from compresskv.system.jsonl_log import JsonlLog
from compresskv.system.locking import locked


def check_log_folder(folder: Path) -> None:
    """Find out, before long work, whether finished runs can be kept in a folder; it is made.

    Raises:
        ProfileError: they cannot.
    """
    try:
        try_place(folder / "any.jsonl")
    except OSError as error:
        raise _unusable(folder, error) from error


@contextmanager
def measuring_alone(folder: Path, model: str, report: Callable[[str, float], None]) -> Iterator[None]:
    """Let one process at a time measure a model; the others wait, and find its runs when it is done.

    Args:
        folder: where the logs are; it is made.
        model: its fingerprint.
        report: told why nothing happens.
    Raises:
        ProfileError: the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            make_folder(folder)
            waiting = "waiting for another process that profiles this model"
            held.enter_context(locked(folder / f"{model}.lock", waiting, lambda message, _: report(message, 0.0)))
        except OSError as error:
            raise _unusable(folder, error) from error
        yield


def _unusable(folder: Path, error: OSError) -> ProfileError:
    return ProfileError(f"cannot keep finished runs in {str(folder)!r}: {error.strerror}")


class RunLog:
    """Results by key, kept in a file. Each is written as soon as it is known; none is kept twice.

    Who adds to it holds `measuring_alone` from opening it on.
    """

    def __init__(self, path: Path) -> None:
        """Read what the log holds; nothing is written before `add`. A damaged line's run is measured again.

        Raises:
            ProfileError: the place cannot be read or written.
        """
        self.path = path
        try:
            self._log = JsonlLog(path, _keyed_result)
        except OSError as error:
            raise self._error(error) from error
        self._results = dict(self._log.values)

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
            self._log.append({"key": key, "result": result})
        except OSError as error:
            raise self._error(error) from error
        self._results[key] = result

    def _error(self, error: OSError) -> ProfileError:
        return ProfileError(f"cannot keep finished runs in {str(self.path)!r}: {error.strerror}")


def _keyed_result(row: Any) -> tuple[Hashable, Any]:
    key = tuple(row["key"])
    hash(key)  # TypeError where a part is a list: nobody wrote such a key
    return key, row["result"]
