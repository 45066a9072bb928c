"""Output in encodings that lack characters: what cannot be written is escaped as in JSON, and ends no command."""

import codecs
import io
import sys

_ESCAPED = "compresskv.escaped"


def escape_unwritable() -> None:
    """Let standard output and error write '\\u2192' where their encoding has no arrow.

    In JSON that is the same text. What was chosen otherwise (PYTHONIOENCODING=ascii:replace) stays.
    """
    codecs.register_error(_ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and _may_fail(stream):
            stream.reconfigure(errors=_ESCAPED)


def _may_fail(stream: io.TextIOWrapper) -> bool:
    """'surrogateescape' is what Python itself chooses in the C locale; in UTF-8 it writes names as they are on disk."""
    is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
    return stream.errors == "strict" or (stream.errors == "surrogateescape" and not is_utf8)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True)), error.end
