"""How the command line's text becomes values, and how it reads a document. Nothing here loads a model."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compresskv.cli import main
from compresskv.cli.ask import read_document
from compresskv.cli.options import parse_numbers
from compresskv.cli.terminal import Bar, megabytes
from compresskv.errors import ConfigError, PromptError
from compresskv.methods.options import parse_settings


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("1024", (1024,)),
            ("1024,4096", (1024, 4096)),
            (" 1024 , 4096, ", (1024, 4096)),
        ],
    )
    def test_lists(self, text: str, numbers: tuple[int, ...]) -> None:
        assert parse_numbers("lengths", text, int) == numbers

    def test_depths_may_have_a_fraction(self) -> None:
        assert parse_numbers("depths", "12.5,50", float) == (12.5, 50.0)

    def test_an_option_that_is_not_given_stays_away(self) -> None:
        assert parse_numbers("lengths", None, int) is None

    @pytest.mark.parametrize("text", ["", ",", "abc", "1024;2048", "1024 2048", "1e3", "10.5", "1024,x", "0x10"])
    def test_what_is_no_list_of_numbers_is_told_with_option_and_value(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^lengths=") as caught:
            parse_numbers("lengths", text, int)
        assert repr(text) in str(caught.value)


class TestSettings:
    def test_numbers_of_both_kinds_and_both_spellings_of_a_name(self) -> None:
        assert parse_settings("settings", ["window_size=32", "beta=2.5", "kernel-size=7"]) == {
            "window_size": 32,
            "beta": 2.5,
            "kernel_size": 7,
        }

    def test_the_last_of_two_counts(self) -> None:
        assert parse_settings("settings", ["beta=1", "beta=2"]) == {"beta": 2}

    @pytest.mark.parametrize("text", ["window_size", "window_size=", "=3", "=", ""])
    def test_what_is_no_name_and_value(self, text: str) -> None:
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_settings("settings", [text])

    @pytest.mark.parametrize("text", ["window_size=many", "a=b=3", "beta=1,5"])
    def test_values_that_are_no_numbers(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not a number"):
            parse_settings("settings", [text])


class TestDocument:
    def test_a_file_is_read_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("naïve\r\n text\n".encode())
        assert read_document(str(tmp_path / "a.txt")) == "naïve\r\n text\n"

    def test_a_byte_order_mark_is_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
        assert read_document(str(tmp_path / "a.txt")) == "text"

    def test_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped text")))
        assert read_document("-") == "piped text"

    def test_closed_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(PromptError, match="standard input is closed"):
            read_document("-")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.txt", "No such file"),
            ("folder", "Is a directory"),
            ("empty.txt", "is empty"),
            ("blank.txt", "is empty"),
            ("binary.txt", "is binary"),
            ("latin.txt", "byte 2 cannot be read"),
            ("a" * 300, "File name too long"),
        ],
    )
    def test_what_cannot_be_read_is_told_by_name(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "folder").mkdir()
        for file, content in {
            "empty.txt": b"",
            "blank.txt": b" \n\t\n",
            "binary.txt": b"PK\x03\x04\0\0text",
            "latin.txt": "naïve".encode("latin-1"),
        }.items():
            (tmp_path / file).write_bytes(content)
        with pytest.raises(PromptError, match=message) as caught:
            read_document(str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


class TestTerminal:
    @pytest.mark.parametrize(
        ("nbytes", "text"),
        [(0, "0.0"), (1_250_000, "1.2"), (99_949_999, "99.9"), (100_000_000, "100"), (12_345_678_901, "12,346")],
    )
    def test_megabytes(self, nbytes: int, text: str) -> None:
        assert megabytes(nbytes) == text

    def test_the_bar_is_silent_where_nobody_watches(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Bar() as bar:
            bar("reading", None)
            bar("reading", 0.5)
            bar("writing", 1.0)
            bar.stop()
            bar("after the end", 0.1)
        assert capfd.readouterr() == ("", "")


class TestProfileIsFind:
    @pytest.mark.parametrize("args", [["model"], ["./folder"], ["find", "model"], ["--quick", "model"]], ids=" ".join)
    def test_a_model_in_place_of_a_subcommand(
        self, args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Only `find` has --lengths, and refuses them before it loads the model."""
        monkeypatch.setattr(sys, "argv", ["compresskv", "profile", *args, "--lengths", "long"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr() == (
            "",
            "compresskv: --lengths 'long' is not a list of numbers separated by commas\n",
        )

    def test_a_subcommand_is_no_model(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["compresskv", "profile", "show", "nothing"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("compresskv: 'nothing' is neither a profile file nor a model")
