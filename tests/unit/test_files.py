"""Files are written whole or not at all, everywhere in the package, on a disk that is really full too."""

import ast
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import compresskv
from compresskv.bench.stored import StoredRun
from compresskv.errors import CompressKVError
from compresskv.evaluation.press_request import PressRequest
from compresskv.evaluation.report import write_pages
from compresskv.models.fingerprint import Fingerprint
from compresskv.peers.answers import write_request
from compresskv.plans.plan import LayerPlan, Plan
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile
from compresskv.system.drawing import new_figure, save_figure
from compresskv.system.files import write_text, write_whole

SOURCE = Path(compresskv.__file__).parent

ELSEWHERE = {
    "system/files.py": "the helper",
    "system/jsonl_log.py": "appends whole lines, and takes back what was cut short",
    "system/memory.py": "a switch of the kernel's, no file",
    "system/drawing.py": "into memory",
    "peers/process.py": "a temporary folder",
    "peers/presses.py": "a temporary folder",
    "profiles/authors.py": "a temporary folder",
    "models/download.py": "a scratch folder, renamed when its contents are checked",
    "models/embedded.py": "a scratch folder, renamed when it is complete",
    "compiled/export.py": "a scratch folder, renamed when it is complete",
    "cli/read.py": "a session, by the helper",
    "cli/chat.py": "a session, by the helper",
}
"""Files that write otherwise, and why they may."""

_WRITERS = {"write_text", "write_bytes", "savefig", "save_pretrained", "save_file", "save", "dump"}


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file past the helper."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _WRITERS:
        return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    texts = [
        arg.value for arg in [*call.args, *(word.value for word in call.keywords)] if isinstance(arg, ast.Constant)
    ]
    modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+") and text]
    return name == "open" and any(set(mode) & set("wax+") for mode in modes)


def test_nothing_else_in_the_package_writes_files() -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and writes(node)
    }
    assert found == set(ELSEWHERE)


@contextmanager
def full_disk(nbytes: int = 10) -> Iterator[None]:
    """No file may grow above `nbytes`: the system refuses, as it does where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _profile(path: Path) -> None:
    own = Fingerprint("llama", 1, 4, 2, 8, "0" * 12)
    scores = ((0.1, 0.2, 0.3, 0.4),)
    write_profile(Profile("model", own, (0,), scores, scores, 1, {"needle": (1.0,)}, (1.0,), {}), path)


def _plan(path: Path) -> None:
    Plan("llama", 5, "0" * 16, "snapkv", 2, None, (LayerPlan(0, ((0, 1),), ((0.5, None),)),)).write(path)


def _figure(path: Path) -> None:
    save_figure(new_figure(2, 2), path)


def _report(path: Path) -> None:
    write_pages({"runs": ["run"], "models": []}, path.parent)


def _request(path: Path) -> None:
    write_request(path, PressRequest("model", (), ("KnormPress",), (64,), ("aware",), None, None, "tokens"))


def _bench(path: Path) -> None:
    run: Any = None
    StoredRun(run, path, None).write({"rows": [{"length": 1024}]}, finished=True)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("profile.json", _profile),
        ("plan.json", _plan),
        ("figure.png", _figure),
        ("report.md", _report),
        ("request.json", _request),
        ("bench.json", _bench),
        ("page.html", lambda path: write_text(path, "<html>" * 100)),
    ],
)
class TestFullDisk:
    def test_what_was_there_is_there_still(self, tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
        path = tmp_path / name
        path.write_text("old")
        with full_disk(), pytest.raises((CompressKVError, OSError), match="File too large") as caught:
            write(path)
        assert "\n" not in str(caught.value)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_no_empty_file_is_made(self, tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
        with full_disk(), pytest.raises((CompressKVError, OSError), match="File too large"):
            write(tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_with_room_it_is_written(self, tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
        write(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).stat().st_size > 10


class TestPlaces:
    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to("real")
        write_text(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"

    def test_a_device_stays_a_device(self) -> None:
        write_whole("/dev/null", b"text")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    def test_a_pipe_gets_it(self, tmp_path: Path) -> None:
        reader, writer = os.pipe()
        write_whole(f"/dev/fd/{writer}", b"text")
        assert os.read(reader, 10) == b"text"
        os.close(reader)
        os.close(writer)

    @pytest.mark.parametrize("mode", [0o600, 0o664])
    def test_permissions_stay(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "file"
        path.touch()
        path.chmod(mode)
        write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
    def test_the_owner_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        os.chown(path, 1234, 4321)
        write_text(path, "new")
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)

    def test_what_is_protected_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write whatever the mode says
        with pytest.raises(PermissionError):
            write_text(path, "new")
        assert path.read_text() == "old"

    def test_a_long_name(self, tmp_path: Path) -> None:
        path = tmp_path / ("x" * 255)
        write_text(path, "new")
        assert path.read_text() == "new"
