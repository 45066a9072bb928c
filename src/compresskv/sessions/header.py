"""The head of a session's file, which tells what it is: read without PyTorch, and without what follows."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from compresskv.errors import SessionError, told
from compresskv.sessions.facts import Facts
from compresskv.sessions.turn import Turn, untold_turns
from compresskv.system.convert import convert
from compresskv.system.paths import is_file, is_folder

FORMAT = "compresskv-session"
DOCUMENT_VERSION = 1
"""Of files with a budget, without a conversation and without packed stores, which the earliest release reads, too."""
CONVERSATION_VERSION = 2
"""Of other files without packed stores."""
VERSION = 3
"""Of files with packed stores, whose first tokens lie apart."""
_LENGTH = 8
_MOST_NBYTES = 100_000_000  # what safetensors reads
_START = b'{"__metadata__":{'


def is_session(path: str | Path) -> bool:
    """Whether a file begins as a session's does; no other file does so, of text or not. False where there is none."""
    try:
        with Path(path).open("rb") as file:
            return is_file(path) and _head(file) is not None
    except OSError:
        return False


def is_cut(path: str | Path) -> bool:
    """Whether a file may be the first part of a session, cut before it says so. False where there is none."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(_LENGTH + len(_START))
            length = int.from_bytes(start[:_LENGTH], "little")
            begins = len(start) >= _LENGTH and _START.startswith(start[_LENGTH:])
            return begins and Path(path).stat().st_size < _LENGTH + length <= _LENGTH + _MOST_NBYTES
    except OSError:
        return False


def read_facts(path: str | Path) -> Facts:
    """What a session's file tells about itself; what it holds is not looked at.

    Raises:
        SessionError: as for `read_metadata`.
    """
    return facts_of(path, read_metadata(path))


def facts_of(path: str | Path, metadata: dict[str, Any]) -> Facts:
    """The facts among a file's metadata.

    Raises:
        SessionError: they are not what they should be.
    """
    try:
        return convert(metadata.get("facts"), Facts)
    except ValueError as error:
        raise SessionError(f"session {str(path)!r} is damaged: in its head, {error}") from error


def turns_of(path: str | Path, metadata: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of the conversation among a file's metadata; files of earlier releases tell where they begin alone.

    Raises:
        SessionError: they are not what they should be.
    """
    try:
        if metadata.get("said") is None or "turns" in metadata:
            return convert(metadata.get("turns", []), tuple[Turn, ...])
        return untold_turns(convert(metadata["said"][1], list[int]))
    except (ValueError, LookupError, TypeError) as error:
        raise SessionError(f"session {str(path)!r} is damaged: in its head, of its turns, {error}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """All that a session's file has in JSON.

    Raises:
        SessionError: no such file, no session, one of a newer release, or a damaged one; the message names it.
    """
    try:
        with Path(path).open("rb") as file:
            head = _head(file)
        nbytes = Path(path).stat().st_size
    except OSError as error:
        problem = "is a folder: give a file" if is_folder(path) else f": {error.strerror}"
        raise SessionError(told(f"session {str(path)!r}", problem)) from error
    if head is None and is_cut(path):
        raise SessionError(f"session {str(path)!r} is damaged: its head was cut short")
    if head is None:
        raise SessionError(f"{str(path)!r} is not a session: make one with `compresskv read`")
    try:
        tensors = json.loads(head)
        metadata = tensors.pop("__metadata__")
        version = int(metadata["version"])
        if not DOCUMENT_VERSION <= version <= VERSION:
            raise SessionError(
                f"session {str(path)!r} is of format {version}, this release reads {VERSION}: "
                "read the document again, or use the release that wrote it"
            )
        told_nbytes = _LENGTH + len(head) + max((one["data_offsets"][1] for one in tensors.values()), default=0)
        if nbytes != told_nbytes:
            raise SessionError(f"session {str(path)!r} is damaged: it has {nbytes:,} bytes, not {told_nbytes:,}")
        return {**json.loads(metadata["session"]), "sha256": metadata["sha256"]}
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise SessionError(f"session {str(path)!r} is damaged: its head cannot be read") from error


def _head(file: BinaryIO) -> bytes | None:
    """The JSON that a safetensors file begins with; None where it is no session."""
    start = file.read(_LENGTH + len(_START))
    length = int.from_bytes(start[:_LENGTH], "little")
    if start[_LENGTH:] != _START or length > _MOST_NBYTES:
        return None
    head = start[_LENGTH:] + file.read(length - len(_START))
    return head if f'"format":"{FORMAT}"'.encode() in head else None
