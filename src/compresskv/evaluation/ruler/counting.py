"""Words to count: which occur most often in a numbered list, or in a text of made-up words."""

import math
import random
import string

from compresskv.evaluation.ruler.puzzle import Puzzle
from compresskv.evaluation.ruler.words import ADJECTIVES, NOUNS, VERBS

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:",
)
_NUM_COMMON = 10
_LONG = 4096
"""From this length on, words are repeated more often: (30, 3) times instead of (6, 1)."""
_SHOT = {False: (20, 3, 1), True: (40, 10, 3)}  # different words, repeats of common and of other ones
_REPEATS = {False: (6, 1), True: (30, 3)}
_SINGLE_WORDS = (*ADJECTIVES, *NOUNS, *VERBS)

_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:",
)
_ALPHA = 2.0  # word k of the coded text occurs k ** -2 times as often as the first, which is dots
_ZETA = math.pi**2 / 6
_CODED_LETTERS = 6
_TOKENS_A_WORD = 50  # of the text, for each word of the code


class CommonWords(Puzzle):
    """The ten words that are repeated more often than all others, after one solved example.

    A document's size is its number of other words. Words are single ones as far as they last, else pairs of them.
    """

    max_new_tokens = 120

    def __init__(self, draw: random.Random, length: int) -> None:
        """Draw the words.

        Args:
            length: of the prompt in tokens: longer ones repeat words more often.
        """
        is_long = length >= _LONG
        self._repeats = _REPEATS[is_long]
        num_words, *repeats = _SHOT[is_long]
        shot = draw.sample(_SINGLE_WORDS, num_words)
        solved = f"{_COMMON[0]}{_listed(draw, shot, *repeats)}{_COMMON[1]}"
        self.prefix = f"{solved} {_numbered(shot[:_NUM_COMMON])}\n{_COMMON[0]}"
        self.suffix = _COMMON[1]
        # A repetition takes three tokens or more.
        fewest = _NUM_COMMON + length // (3 * self._repeats[1])
        words = _SINGLE_WORDS if fewest <= len(_SINGLE_WORDS) else _pairs()
        self._words = draw.sample(words, len(words))
        self.answers = tuple(self._words[:_NUM_COMMON])
        self._seed = draw.getrandbits(64)

    def document(self, size: int) -> str | None:
        """The numbered list with `size` words beside the common ones."""
        words = self._words[: _NUM_COMMON + size]
        return None if len(words) < _NUM_COMMON + size else _listed(random.Random(self._seed), words, *self._repeats)


class FrequentWords(Puzzle):
    """The three made-up words that occur most often; a document's size is about its number of words."""

    max_new_tokens = 50
    least_size = 96  # the third and the fourth word then occur differently often

    def __init__(self, draw: random.Random, length: int) -> None:
        """Draw the words.

        Args:
            length: of the prompt in tokens: longer ones are of more words.
        """
        words: dict[str, None] = {}
        while len(words) < max(length // _TOKENS_A_WORD, _NUM_COMMON):
            words["".join(draw.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
        self._words = ["...", *list(words)[1:]]
        self._seed = draw.getrandbits(64)
        self.prefix, self.suffix = _FREQUENT
        self.answers = tuple(self._words[1:4])

    def document(self, size: int) -> str:
        """The words in random order, each as often as its rank says."""
        counts = [int(size * rank**-_ALPHA / _ZETA) for rank in range(1, len(self._words) + 1)]
        text = [word for word, count in zip(self._words, counts, strict=True) for _ in range(count)]
        random.Random(self._seed).shuffle(text)
        return " ".join(text)


def _pairs() -> tuple[str, ...]:
    return tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)


def _listed(draw: random.Random, words: list[str], often: int, seldom: int) -> str:
    """A numbered list in random order; the first ten words occur `often`, the others `seldom`."""
    repeated = [word for at, word in enumerate(words) for _ in range(often if at < _NUM_COMMON else seldom)]
    draw.shuffle(repeated)
    return _numbered(repeated)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
