"""Documents are text files: which are read, in which encodings, and what is said of the others."""

import codecs
import re
import shlex
import sys
from pathlib import Path
from typing import BinaryIO

from compresskv.errors import PromptError, told

MAX_NBYTES = 64 * 2**20
"""The largest document: about sixteen million tokens, more than any model reads."""

_MARKS = {  # longest first: the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DECLARED = re.compile(rb"""(?:charset|encoding|coding)\s*[=:]\s*["']?\s*([A-Za-z][A-Za-z0-9._-]*)""", re.IGNORECASE)
_HEAD_NBYTES = 1024  # where XML, HTML and editors declare an encoding
_CHUNK_NBYTES = 2**20


def read_document(document: str) -> str:
    """The text of a file, or of standard input for '-'.

    Raises:
        PromptError: missing, a folder, empty, too large, or not text that can be read; the message names it and, where
            it can be converted, how.
    """
    if not document.strip():
        raise PromptError(f"document {document!r} names no file")
    if document == "-" and sys.stdin is None:
        raise PromptError("document '-': standard input is closed")
    try:
        text = _decoded(_read(sys.stdin.buffer, "FILE"), "FILE") if document == "-" else read_text(Path(document))
        if not text.strip():
            raise PromptError("is empty")
    except PromptError as error:
        name = "standard input" if document == "-" else repr(document)
        raise PromptError(told(f"document {name}", error.problem)) from error
    return text


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8 or in an encoding that the file names itself.

    Raises:
        PromptError: it cannot be read; the message follows the file's name.
    """
    try:
        with path.open("rb") as file:
            return _decoded(_read(file, str(path)), str(path))
    except OSError as error:
        raise PromptError(f": {error.strerror}") from error


def _read(file: BinaryIO, path: str) -> bytes:
    """All bytes, but no more than a document may have, and few where the first ones show that it is no text."""
    data = file.read(_CHUNK_NBYTES)
    _refuse_binary(data, path)
    data += file.read(MAX_NBYTES + 1 - len(data))
    if len(data) > MAX_NBYTES:
        raise PromptError(f"has more than {MAX_NBYTES // 2**20} MB, which no model reads: give a part of it")
    return data


def _refuse_binary(data: bytes, path: str) -> None:
    if b"\0" not in data or _marked(data) in ("utf-16", "utf-32"):
        return
    even, odd = (data[side:_HEAD_NBYTES:2].count(0) for side in (0, 1))
    if min(even, odd) == 0 and max(even, odd) > len(data[:_HEAD_NBYTES]) // 4:  # one byte of two is 0 in Latin text
        encoding = "UTF-16BE" if even else "UTF-16LE"
        raise PromptError(f"seems to be {encoding} without the mark that says so: {_conversion(encoding, path)}")
    raise PromptError("is binary: give a text file")


def _decoded(data: bytes, path: str) -> str:
    _refuse_binary(data, path)
    encoding = _marked(data) or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            problem = f"is not {encoding.removesuffix('-sig').upper()} text, as its first bytes say"
            raise PromptError(f"{problem}: byte {error.start} cannot be read") from error
        if (declared := _by_declaration(data)) is not None:
            return declared
        how = f"if it is in a Western encoding, {_conversion('CP1252', path)}"
        raise PromptError(f"is not UTF-8 text: byte {error.start} cannot be read; {how}") from error


def _marked(data: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)


def _by_declaration(data: bytes) -> str | None:
    """The text in the encoding that the file itself declares, as XML, HTML and source files do; None without one."""
    found = _DECLARED.search(data[:_HEAD_NBYTES])
    if found is None:
        return None
    try:
        return data.decode(found[1].decode("ascii"))
    except (LookupError, ValueError):  # LookupError: unknown, or no encoding of text
        return None


def _conversion(encoding: str, path: str) -> str:
    return f"convert it with `iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > converted.txt`"
