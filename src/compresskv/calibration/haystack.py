"""The long text that needles are hidden in: sentences, and documents of a wanted length made of them."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from compresskv.calibration.needles import Needle, NeedleDocument
from compresskv.errors import ConfigError, DataError, PromptError
from compresskv.prompts.document import read_text
from compresskv.system.paths import is_folder

DEFAULT_HAYSTACK = Path(__file__).parent / "haystack.txt"
"""The help topics of Python 3.11: the same text everywhere, whatever Python runs."""
_LONGEST_SENTENCE = 600  # characters
_NEAR = 16  # a document this many tokens short of the wanted length is long enough


def read_haystack(paths: Sequence[Path] = ()) -> list[str]:
    """Sentences to hide needles between: of text files or folders of them, or of `DEFAULT_HAYSTACK`.

    Raises:
        DataError: a path is missing or is not text.
    """
    chosen = paths or [DEFAULT_HAYSTACK]
    files = [file for path in chosen for file in (sorted(path.rglob("*.txt")) if is_folder(path) else [path])]
    texts = [_read_text(file) for file in files]
    # Ends of sentences and of paragraphs; white space inside a sentence is layout, not content.
    pieces = (" ".join(piece.split()) for text in texts for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    # Text without ends of sentences, such as code or Chinese, is cut by length.
    sentences = [part for piece in pieces for part in textwrap.wrap(piece, _LONGEST_SENTENCE)]
    if not sentences:
        raise DataError("holds no text", option="haystack", value=[str(path) for path in paths])
    return sentences


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except PromptError as error:
        raise DataError(error.problem, option="haystack", value=str(file)) from error


class Haystack:
    """Sentences with their token counts, from which documents of a wanted length are made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> None:
        self._sentences = sentences
        self._tokenizer = tokenizer
        encoded = tokenizer([f" {sentence}" for sentence in sentences], add_special_tokens=False, verbose=False)
        self._counts = [len(ids) for ids in encoded["input_ids"]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole haystack."""
        return sum(self._counts)

    def document(
        self, length: int, rotation: int, depths: Sequence[float], needles: list[Needle], reserved: int = 0
    ) -> NeedleDocument:
        """A text from an offset set by `rotation`, with needles at the depths.

        Args:
            length: tokens of the prompt and its answer: the document is a little shorter, never longer.
            rotation: each needle stands at each depth once over as many as there are needles, or depths if more.
            reserved: how many of these tokens the chat template, the question and the answer take.
        Raises:
            DataError: the haystack is shorter than that.
            ConfigError: the length leaves no room for text beside the needles.
        """
        if self.num_tokens < length:
            raise DataError(
                f"the haystack has {self.num_tokens} tokens, fewer than the longest length {length}: "
                "give a longer haystack or smaller lengths"
            )
        placed = _placed(rotation, depths, needles)
        encoded = (self._tokenizer(f" {needle.needle}", add_special_tokens=False) for _, needle in placed)
        wanted = length - reserved - sum(len(one["input_ids"]) for one in encoded)
        if wanted < _NEAR:
            raise ConfigError(
                f"a length of {length} tokens leaves no room for text beside {len(placed)} needles, the question and "
                "the answer: choose a longer one or fewer depths"
            )
        # 7919 is prime: successive rotations start far apart, at ever new places
        start = rotation * 7919 % len(self._sentences)
        sentences: list[str] = []
        ends: list[int] = []
        total = 0
        for step in range(len(self._sentences)):
            place = (start + step) % len(self._sentences)
            if total + self._counts[place] > wanted:
                continue  # too long to fit: look for a shorter one
            sentences.append(self._sentences[place])
            total += self._counts[place]
            ends.append(total)
            if wanted - total < _NEAR:
                break
        for depth, needle in reversed(placed):
            at = sum(1 for end in ends if end <= depth / 100 * total)
            sentences.insert(at, needle.needle)
        return NeedleDocument(f"{length}-{rotation}", " ".join(sentences), placed)


def _placed(rotation: int, depths: Sequence[float], needles: list[Needle]) -> tuple[tuple[float, Needle], ...]:
    """(depth, needle), by depth; the longer of the two lists is rotated, so that each meets each."""
    count = min(len(depths), len(needles))
    turn = [(rotation + i) % max(len(depths), len(needles)) for i in range(count)]
    if len(depths) > len(needles):
        pairs = [(depths[at], needles[i]) for i, at in enumerate(turn)]
    else:
        pairs = [(depths[i], needles[at]) for i, at in enumerate(turn)]
    return tuple(sorted(pairs, key=lambda pair: pair[0]))
