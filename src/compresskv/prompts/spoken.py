"""Tokens become text while they are generated."""

import unicodedata
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase


class Spoken:
    """Hands on an answer's text as its tokens come, held back until a word is whole: its end may change its spelling.

    All pieces together are the text of all tokens, without special ones. Words of scripts that put no spaces between
    them, such as Chinese, are handed on at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._line: list[int] = []
        self._num_told = 0

    def put(self, token: int) -> None:
        """Take the next token."""
        self._line.append(token)
        text = self._text()
        if text.endswith("\n"):  # no later token changes it
            self._tell(text)
            self._forget_line()
        elif text and unicodedata.east_asian_width(text[-1]) in "WF":
            self._tell(text)
        else:
            self._tell(text[: text.rfind(" ") + 1])

    def end(self) -> None:
        """No more tokens come."""
        self._tell(self._text())

    def _forget_line(self) -> None:
        """All but its end stands in front of the next line's text: some decoders leave out a text's first space."""
        line = self._line
        for start in range(len(line) - 1, -1, -1):
            self._line = line[start:]
            if (text := self._text()).endswith("\n"):
                self._num_told = len(text)
                return

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._line, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if len(text) > self._num_told:
            self._on_text(text[self._num_told :])
            self._num_told = len(text)
