"""What a puzzle is, and how long its document may be."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ConfigError
from compresskv.prompts.template import encode_message


class Puzzle(ABC):
    """A question whose document can be made of any size; the same size gives the same document."""

    max_new_tokens: ClassVar[int]
    least_size: int = 1
    prefix: str
    suffix: str
    """The question, and the beginning of its answer."""
    answers: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    """What stands in every document and is asked for; empty where the whole document is."""

    @abstractmethod
    def document(self, size: int) -> str | None:
        """The document of a size, in a unit of the puzzle's own, from `least_size` on; None above the largest one."""

    def longest(self, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
        """The largest document that leaves prompt and answer within `length` tokens.

        Raises:
            ConfigError: the smallest one is too long.
        """

        def num_tokens(size: int) -> float:
            text = self.document(size)
            if text is None:
                return math.inf
            message = encode_message(tokenizer, self.prefix + text + self.suffix)
            return len(message.input_ids) + self.max_new_tokens

        size = least = self.least_size
        used = first = num_tokens(least)
        if first > length:
            raise ConfigError("is too short", option="lengths", value=length)
        slope = max(1.0, min(num_tokens(2 * least), length) - first) / least  # tokens that one more adds, about
        too_large = None
        while too_large is None or too_large - size > 1:
            tried = size + max(1, int((length - used) / slope))
            if too_large is not None and tried >= too_large:
                tried = (size + too_large) // 2
            tokens = num_tokens(tried)
            if tokens > length:
                too_large = tried
            else:
                size, used, slope = tried, tokens, max(1.0, tokens - first) / (tried - least)
        text = self.document(size)
        assert text is not None
        return text
