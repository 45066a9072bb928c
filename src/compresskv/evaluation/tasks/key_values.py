"""Documents of random keys and values: nothing in them can be guessed, and every line looks like every other."""

import random
import uuid
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ConfigError


@dataclass(frozen=True)
class Pair:
    """One line: a random UUID as key, another as value."""

    key: str
    value: str

    @property
    def line(self) -> str:
        """As it stands in the document."""
        return f'"{self.key}": "{self.value}"'


def draw_pair(draw: random.Random) -> Pair:
    """The next pair of a seeded generator."""
    key, value = (str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(2))
    return Pair(key, value)


def hide_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, *, depth: float, num_tokens: int, draw: random.Random
) -> str:
    """A document of at most `num_tokens` tokens that holds `pair` among as many others as fit.

    Args:
        depth: in per cent of the other pairs: 0 makes it the first line, 100 the last.
    Raises:
        ConfigError: not even one other pair fits.
    """
    room = num_tokens - _count(tokenizer, pair.line)
    lines: list[str] = []
    while (room := room - _count(tokenizer, (line := draw_pair(draw).line))) >= 0:
        lines.append(line)
    if not lines:
        raise ConfigError(f"{num_tokens} tokens are too few for two pairs of keys and values")
    lines.insert(round(depth / 100 * len(lines)), pair.line)
    return "\n".join(lines)


def _count(tokenizer: PreTrainedTokenizerBase, line: str) -> int:
    return len(tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"])
