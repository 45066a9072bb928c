"""Which documents are read, and what is said of those that are not, before memory is full."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compresskv.calibration.haystack import read_haystack
from compresskv.errors import DataError, PromptError
from compresskv.prompts import document
from compresskv.prompts.document import read_document

TEXT = "naïve café — “42”.\r\nIt rained.\n"
WESTERN = "naïve café: 42.\nIt rained.\n"


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


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-8"])
    def test_a_mark_is_believed(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
        assert read_document(str(tmp_path / "a.txt")) == TEXT

    @pytest.mark.parametrize("mark", [b"\xfe\xff", b"\xff\xfe"])
    def test_either_order_of_bytes(self, tmp_path: Path, mark: bytes) -> None:
        encoding = "utf-16-be" if mark[0] == 0xFE else "utf-16-le"
        (tmp_path / "a.txt").write_bytes(mark + TEXT.encode(encoding))
        assert read_document(str(tmp_path / "a.txt")) == TEXT

    @pytest.mark.parametrize(
        "head",
        [
            '<?xml version="1.0" encoding="ISO-8859-1"?>\n',
            "<?xml version='1.0' encoding='latin-1'?>\n",
            "<html><meta charset=windows-1252>\n",
            '<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-15">\n',
            "# -*- coding: cp1252 -*-\n",
        ],
    )
    def test_an_encoding_that_the_file_declares_is_believed(self, tmp_path: Path, head: str) -> None:
        (tmp_path / "a.txt").write_bytes((head + WESTERN).encode("latin-1"))
        assert read_document(str(tmp_path / "a.txt")) == head + WESTERN

    def test_utf_8_that_declares_another_encoding_is_utf_8(self, tmp_path: Path) -> None:
        text = '<meta charset="iso-8859-1">' + TEXT
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert read_document(str(tmp_path / "a.txt")) == text

    @pytest.mark.parametrize("head", ["", "encoding: nonsense\n", "encoding: base64\n", "charset=utf-8\n"])
    def test_without_a_sure_sign_it_is_told_how_to_convert(self, tmp_path: Path, head: str) -> None:
        path = tmp_path / "a file.txt"
        path.write_bytes((head + WESTERN).encode("latin-1"))
        with pytest.raises(PromptError, match=f"byte {len(head) + 2} cannot be read; if it is in a Western") as caught:
            read_document(str(path))
        command = str(caught.value).split("`")[1]
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert read_document(str(tmp_path / "converted.txt")) == head + WESTERN

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
    def test_utf_16_without_a_mark_is_named(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.txt").write_bytes("It rained all day.".encode(encoding))
        with pytest.raises(PromptError, match=f"seems to be {encoding.upper().replace('16-', '16')} without the mark"):
            read_document(str(tmp_path / "a.txt"))

    @pytest.mark.parametrize("data", [b"\xff\xfea", b"\xfe\xff\xd8\x00\x00a", b"\xef\xbb\xbf\xff"])
    def test_a_mark_that_is_wrong_is_told(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(PromptError, match=r"as its first bytes say: byte \d cannot be read"):
            read_document(str(tmp_path / "a.txt"))

    def test_a_haystack_is_read_alike(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(TEXT.encode("utf-16"))
        assert " ".join(read_haystack([path])) == " ".join(TEXT.split())
        path.write_bytes(WESTERN.encode("latin-1"))
        with pytest.raises(DataError, match="is not UTF-8 text: byte 2 cannot be read; if"):
            read_haystack([path])


class TestLimits:
    def test_what_has_no_end_is_refused_before_memory_is_full(self) -> None:
        """In a process that may have half a gigabyte."""
        program = (
            "import resource, sys\n"
            "from compresskv.errors import PromptError\n"
            "from compresskv.prompts.document import read_document\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
            "for name in ('/dev/zero', '-'):\n"
            "    try:\n"
            "        read_document(name)\n"
            "    except PromptError as error:\n"
            "        print(error)\n"
        )
        lines = subprocess.Popen(["yes", "A line without end."], stdout=subprocess.PIPE)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdin=lines.stdout, capture_output=True, text=True, check=False)
        lines.kill()
        lines.communicate()
        assert done.stdout.splitlines() == [
            "document '/dev/zero' is binary: give a text file",
            "document standard input has more than 64 MB, which no model reads: give a part of it",
        ], done.stderr

    def test_the_limit_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(document, "MAX_NBYTES", 2**20 + 8)
        path = tmp_path / "a.txt"
        path.write_bytes(b"x" * (2**20 + 8))
        assert len(read_document(str(path))) == 2**20 + 8
        path.write_bytes(b"x" * (2**20 + 9))
        with pytest.raises(PromptError, match="more than 1 MB"):
            read_document(str(path))

    def test_a_binary_file_that_begins_as_text_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pdf"
        path.write_bytes(b"%PDF-1.7\n" * 2**17 + b"\0\x01")
        with pytest.raises(PromptError, match="is binary: give a text file"):
            read_document(str(path))

    def test_a_pipe_is_read(self) -> None:
        reader, writer = os.pipe()
        os.write(writer, TEXT.encode())
        os.close(writer)
        assert read_document(f"/dev/fd/{reader}") == TEXT
        os.close(reader)
