"""What a command writes must not be what it reads, and must be known to be writable before long work."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from compresskv.errors import ConfigError
from compresskv.system import files
from compresskv.system.files import names_folder, try_place
from compresskv.system.inputs import read_json
from compresskv.system.paths import is_file, is_folder, why_unseen

_BEGINNINGS = {"JSON": b"{", "HTML": b"<"}
"""How files of each kind begin that are written here."""

Given: TypeAlias = "str | Path | Sequence[str | Path] | None"

_MODEL_SUFFIXES = {".json", ".jinja", ".safetensors", ".bin", ".gguf", ".model", ".pt", ".pth", ".py", ".txt"}


def check_outputs(outputs: Mapping[str, Given], inputs: Mapping[str, Given]) -> None:
    """Refuse, before anything is read, a file to write that is one to be read, or two to write that are one.

    Links, other spellings of a path, and the file that standard input comes from count as the file itself. A folder
    stands for what is read from it.

    Args:
        outputs: option -> the file or files that it names, or None.
        inputs: parameter -> file, folder or several, '-' for standard input; what is no path of a file is passed over.
    Raises:
        ConfigError: naming the option.
    """
    read = [(name, status) for name, given in inputs.items() for status in _statuses(name, given)]
    written: dict[str, str] = {}
    for option, given in outputs.items():
        for path in _several(given):
            with suppress(OSError):
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    continue  # /dev/null may be written and read by all
                for name, other in read:
                    if os.path.samestat(status, other):
                        problem = f"would replace the {name} itself: name another file"
                        raise ConfigError(problem, option=option, value=str(path))
            place = os.path.realpath(path)
            if written.setdefault(place, option) != option:
                problem = f"is the file of {written[place]}={str(path)!r}, too: name another one"
                raise ConfigError(problem, option=option, value=str(path))


def check_writable(option: str, name: str | Path, *, make_folder: bool = True, kind: str | None = None) -> Path:
    """Find out, before long work, whether a file can be written.

    Args:
        name: as it was typed: a `Path` no longer knows that it ended in a slash.
        make_folder: whether a folder that is not there is made, or refused.
        kind: 'JSON' or 'HTML': what is there and is none of that is not replaced.
    Returns: the file's path.
    Raises:
        ConfigError: it cannot.
    """
    path = Path(name)
    if is_folder(path) or names_folder(name):
        problem = f"{'is' if is_folder(path) else 'names'} a folder: give a file"
        raise ConfigError(problem, option=option, value=str(name))
    if not make_folder and not is_folder(path.parent):
        problem = f"cannot be written: {why_unseen(path) or f'there is no folder {str(path.parent)!r}'}"
        raise ConfigError(problem, option=option, value=path)
    try:
        try_place(path)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", option=option, value=path) from error
    if kind is not None and is_file(path) and not _begins_with(path, _BEGINNINGS[kind]):
        raise ConfigError(f"exists and is no {kind}: name another file", option=option, value=path)
    return path


def _begins_with(path: Path, beginning: bytes) -> bool:
    """Whether a file does, as an empty one does, and one that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(4096).lstrip()
    except OSError:
        return True
    return not data or data.startswith(beginning)


def check_folder(option: str, path: Path | None, names: Sequence[str] = ()) -> None:
    """Find out, before long work, whether files can be written into a folder; it is made. None: nothing is asked.

    Args:
        names: of the files.
    Raises:
        ConfigError: they cannot.
    """
    if path is None:
        return
    try:
        files.make_folder(path)
    except OSError as error:
        raise ConfigError(f"cannot be a folder: {error.strerror}", option=option, value=path) from error
    for name in names:
        check_writable(option, path / name)


def check_future_folder(option: str, folder: Path, names: Sequence[str] = ()) -> None:
    """Find out, before long work, whether a folder can be made and written to; nothing is made.

    Args:
        names: of files that will be written there, and may be there already.
    Raises:
        ConfigError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        for name in names if there == folder else ():
            try_place(folder / name)
    except OSError as error:
        cannot = "be written" if is_folder(folder) else "be a folder"
        raise ConfigError(f"cannot {cannot}: {error.strerror}", option=option, value=folder) from error


def _statuses(name: str, given: Given) -> Iterator[os.stat_result]:
    for path in _several(given):
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: standard input is closed
            if str(path) == "-":
                yield os.fstat(sys.stdin.fileno())
            elif is_folder(path):
                yield from (file.stat() for file in _read_from(name, path))
            else:
                yield path.stat()


def _several(given: Given) -> list[Path]:
    if given is None:
        return []
    return [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]


def _read_from(name: str, folder: Path) -> Iterator[Path]:
    """The files of a folder that a command reads: a model's own, texts of a haystack."""
    if name == "model":
        files = (path for path in folder.iterdir() if path.suffix in _MODEL_SUFFIXES and is_file(path))
        yield from (path for path in files if not _is_ours(path))
    else:
        yield from (path for path in folder.rglob("*.txt") if is_file(path))


def _is_ours(path: Path) -> bool:
    """Whether CompressKV wrote it, into the model's folder: it may be written again."""
    if path.suffix != ".json":
        return False
    try:
        return str(read_json(path)["format"]).startswith("compresskv")
    except (OSError, ValueError, KeyError, TypeError):
        return False
