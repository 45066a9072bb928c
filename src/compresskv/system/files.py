"""The one way a file is written: whole, aside, and then renamed, so that nothing that was there before is ever lost."""

import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compresskv.system.paths import exists, is_file, is_folder


def write_whole(path: str | Path, data: bytes) -> None:
    """Write atomically: see `replacing`.

    Raises:
        OSError: the place cannot be written; what was there is there still.
    """
    with replacing(path) as place:
        place.write_bytes(data)


def names_folder(path: str | Path) -> bool:
    """Whether a path is spelled as a folder's, with a slash at its end."""
    return str(path).endswith(("/", os.sep))


@contextmanager
def replacing(path: str | Path, *, is_private: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` in the end: a reader sees the old file or the new one, even
    after a full disk or a power cut.

    What is no file (a device, a pipe) is written to as it is; a link is followed, and an existing file's permissions
    and, as far as this process may, its owner are kept.

    Args:
        is_private: a new file is for its owner alone.
    Raises:
        OSError: the place cannot be written; what was there is there still.
    """
    if names_folder(path) or is_folder(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if exists(path) and not is_file(path):
        yield Path(path)  # renaming would put a file in the place of /dev/null
        return
    path = Path(os.path.realpath(path))
    before = _replaceable(path)
    shown = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    temporary = path.with_name(f".{shown}.{uuid.uuid4().hex}")  # tempfile's would be unreadable to others
    try:
        temporary.touch(0o600 if is_private else 0o666, exist_ok=False)
        if before is not None:
            with suppress(OSError, AttributeError):  # AttributeError: Windows has no owners
                os.chown(temporary, before.st_uid, before.st_gid)
            temporary.chmod(stat.S_IMODE(before.st_mode))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of text, as UTF-8.

    Raises:
        OSError: as for `write_whole`.
    """
    write_whole(path, text.encode())


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in, where they are not there.

    Raises:
        OSError: it cannot be made; `NotADirectoryError` where a file has its name or that of one above, for which
            `Path.mkdir` says that the file exists.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def try_place(path: Path) -> None:
    """Make the folder that `path` will lie in, and find out whether `replacing` can put a file there; none is made.

    Raises:
        OSError: it cannot.
    """
    make_folder(path.parent)
    place = Path(os.path.realpath(path))
    before = _replaceable(place)
    if before is None or stat.S_ISREG(before.st_mode):  # others are written to as they are
        with tempfile.TemporaryFile(dir=place.parent):
            pass


def _replaceable(path: Path) -> os.stat_result | None:
    """What an existing file is; None where there is none.

    Raises:
        PermissionError: it is protected against writing, which a rename would pass over.
        OSError: it cannot be told, for its name is too long or its folder locked.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        return None
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return before
