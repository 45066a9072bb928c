"""Files that are read at once, such as JSON: no more of them than they may hold, for some have no end."""

import errno
import json
from pathlib import Path
from typing import Any, BinaryIO

MAX_NBYTES = 64 * 2**20
"""The most that an input may hold unless something else is said: 64 MB."""


def read_limited(file: BinaryIO, most: int = MAX_NBYTES) -> bytes:
    """All bytes of an open file.

    Raises:
        OSError: there are more than `most`.
    """
    data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most // 2**20} MB")
    return data


def read_bytes(path: str | Path, most: int = MAX_NBYTES) -> bytes:
    """`read_limited` of a file by its path.

    Raises:
        OSError: it cannot be read, or holds more than `most` bytes.
    """
    with Path(path).open("rb") as file:
        return read_limited(file, most)


def read_json(path: str | Path, most: int = MAX_NBYTES) -> Any:
    """What a JSON file holds, in UTF-8, with its mark or without.

    Raises:
        OSError: it cannot be read, or holds more than `most` bytes.
        ValueError: it is no JSON.
    """
    data = read_bytes(path, most)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:  # whose bytes mean nothing to the file's owner
        raise ValueError("it is no text in UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
