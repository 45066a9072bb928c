"""Where sessions are written: which files may be made, and which may be replaced."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from compresskv.cli.kept import SUFFIX
from compresskv.cli.outputs import check_folder, check_writable
from compresskv.errors import ConfigError, SessionError
from compresskv.sessions.header import facts_of, is_session, read_metadata
from compresskv.system.paths import exists, is_file, is_folder

STANDARD_INPUT = "standard input"


def name_of(document: str) -> str:
    """What a document is called in its session."""
    return STANDARD_INPUT if document == "-" else Path(document).name


def choose_places(documents: Sequence[str], output: str | None) -> list[Path]:
    """One file for each document; nothing is made.

    Args:
        output: a folder, where one is there or the name ends in a slash; else a file.
    Raises:
        ConfigError: one file is named for several, or would be written twice.
    """
    if output is not None and not output.strip():
        raise ConfigError("is empty: name a file or a folder", option="output", value=output)
    folder = Path(output or "")
    ends_in_slash = output is not None and output.endswith(("/", os.sep))
    if output is not None and not ends_in_slash and not is_folder(folder):
        if len(documents) == 1:
            return [folder]
        problem = f"{'is' if exists(folder) else 'names'} a file: name a folder for {len(documents)} documents"
        hint = "" if exists(folder) or folder.suffix == SUFFIX else f", {f'{output}/'!r} makes one"
        raise ConfigError(problem + hint, option="output", value=output)
    names = ["document" if document == "-" else Path(document).stem for document in documents]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"several documents would be written to {name}{SUFFIX}: read them one by one")
    return [folder / f"{name}{SUFFIX}" for name in names]


def check_places(documents: Sequence[str], places: Sequence[Path]) -> None:
    """Make the folders, and refuse what cannot be written, or would be lost: all but a session of the same document.

    Raises:
        ConfigError: naming the file.
    """
    for document, place in zip(documents, places, strict=True):
        if len(places) > 1:
            check_folder("output", place.parent)
        check_place("output", place)
        if is_session(place):
            _check_replaceable(name_of(document), place)


def check_place(option: str, place: Path) -> None:
    """Refuse, before long work, what cannot be written, and what is no session and would be lost.

    Raises:
        ConfigError: naming the file.
    """
    check_writable(option, place)
    if is_file(place) and place.stat().st_size and not is_session(place):
        raise ConfigError("exists and is no session: name another file", option=option, value=place)


def free_place(stem: str) -> Path:
    """A file of this folder that is not there: stem.kvc, or stem-2.kvc and so on."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(place for name in names if not exists(place := Path(f"{name}{SUFFIX}")))


def _check_replaceable(name: str, place: Path) -> None:
    try:
        metadata = read_metadata(place)
        facts = facts_of(place, metadata)
    except SessionError as error:
        raise ConfigError(f"would be replaced: {error}: name another file", option="output", value=place) from error
    if metadata.get("said") is not None:
        raise ConfigError("is a session with a conversation: name another file", option="output", value=place)
    if facts.names != (name,) or name == STANDARD_INPUT:
        problem = f"is a session of {', '.join(facts.names) or 'another document'}: name another file"
        raise ConfigError(problem, option="output", value=place)
