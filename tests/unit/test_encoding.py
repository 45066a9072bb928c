"""Whatever a command writes, no encoding of the terminal ends it."""

import io
import json
import sys
from pathlib import Path

import pytest

from compresskv.cli import main
from compresskv.cli.encoding import escape_unwritable
from compresskv.cli.terminal import Bar, Stream, err, new_table, out
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile

NAME = "naïve → 𝔘 \udcff"
"""One character each that ASCII, cp1252, JSON's short escapes and UTF-8 lack."""
ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8", "shift_jis"]


def streams(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str = "strict") -> tuple[io.BytesIO, io.BytesIO]:
    """New standard output and standard error."""
    written = io.BytesIO(), io.BytesIO()
    for name, bytes_written in zip(("stdout", "stderr"), written, strict=True):
        stream = io.TextIOWrapper(bytes_written, encoding=encoding, errors=errors, write_through=True)
        monkeypatch.setattr(sys, name, stream)
    return written


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestEncodings:
    def test_all_ways_to_write(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        written = streams(monkeypatch, encoding)
        escape_unwritable()
        with Stream(Bar()) as stream:
            stream(NAME)
        out.print(NAME)
        err.print(NAME)
        table = new_table(NAME)
        table.add_row(NAME)
        out.print(table, soft_wrap=False)
        print(NAME, file=sys.stderr)
        shown = NAME.encode(encoding, "compresskv.escaped")
        assert written[0].getvalue().count(shown) == 4
        assert written[1].getvalue().count(shown) == 2

    def test_json_says_the_same(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        written = streams(monkeypatch, encoding)
        escape_unwritable()
        out.print_json(json.dumps({NAME: NAME}))
        assert json.loads(written[0].getvalue().decode(encoding)) == {NAME: NAME}

    def test_commands(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        own = Fingerprint("llama", 1, 4, 2, 8, 100, "0" * 16)
        scores = ((0.1, 0.2, 0.3, 0.4),)
        write_profile(
            Profile("naïve →", own, (0,), scores, scores, 1, {"needle": (1.0,)}, (1.0,), {}), tmp_path / "naïve →.json"
        )
        for args in (["naïve →.json"], ["naïve →.json", "--json"], ["none →"]):
            written = streams(monkeypatch, encoding)
            monkeypatch.setattr(sys, "argv", ["compresskv", "profile", "show", *args])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == (2 if "none →" in args else 0)
            assert (
                b"".join(stream.getvalue() for stream in written).count("→".encode(encoding, "backslashreplace")) == 1
            )


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [("ascii", "replace", b"?"), ("utf-8", "surrogateescape", b"\xff"), ("ascii", "surrogateescape", b"\\udcff")],
)
def test_what_was_chosen_stays(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, shown: bytes) -> None:
    written, _ = streams(monkeypatch, encoding, errors)
    escape_unwritable()
    sys.stdout.write("\udcff")
    assert written.getvalue() == shown


def test_closed_streams_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    escape_unwritable()
