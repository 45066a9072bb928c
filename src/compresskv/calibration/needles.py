"""Calibration prompts: needles hidden in a long text, and questions that ask for them.

Several needles share one document, each at its own depth, so that one prefill serves a question for every needle. The
questions are asked one after another on the same prefilled document, each without the others. Differs from the
paper, which reads the whole prompt anew for each needle; measured, that costs as many prefills as there are questions.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ConfigError, ProfileError, PromptError
from compresskv.prompts.document import read_text
from compresskv.prompts.template import Message, encode_message

DEFAULT_NEEDLES = Path(__file__).parent / "needles.json"
_QUESTION = "{question} Answer in one sentence."
_MIN_SUFFIX = 32  # tokens left to each question's own pass, so that an observation window fits into it
_NEAR = 16  # a document this many tokens short of the wanted length is long enough
SUMMARY = "Summarise the text above in three sentences."
WORDING = (_QUESTION, SUMMARY)


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, and the question whose answer it is."""

    id: str
    kind: str
    needle: str
    question: str

    @property
    def news(self) -> str:
        """The needle's words that the question does not give away."""
        given = set(words(self.question))
        return " ".join(word for word in words(self.needle) if word not in given)


@dataclass(frozen=True)
class Document:
    """A long text with one needle at each depth."""

    name: str
    text: str
    needles: tuple[tuple[float, Needle], ...]
    """(depth in percent, needle), in the order of the text."""

    @property
    def questions(self) -> list[tuple[str, str]]:
        """For each needle, (the question as sent to the model, the needle's text)."""
        return [(_QUESTION.format(question=needle.question), needle.needle) for _, needle in self.needles]


@dataclass(frozen=True)
class Question:
    """One question on a document, as token ids."""

    suffix: list[int]
    """Tokens after the shared prefix: the question, the end of the chat template, and what precedes them."""
    span: slice
    """Where the needle's tokens stand in the whole prompt; empty for a question about the whole text."""


def read_needles(path: Path = DEFAULT_NEEDLES) -> list[Needle]:
    """Needles of a JSON file: {"needles": [{"id", "kind", "needle", "question"}, ...]}.

    Raises:
        ProfileError: unreadable, a field missing, or an id twice; the message names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fields = ("id", "kind", "needle", "question")
        needles = [Needle(*(row[field].strip() for field in fields)) for row in data["needles"]]
    except OSError as error:
        raise ProfileError(f": {error.strerror}", option="needles", value=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = 'is no {"needles": [{"id", "kind", "needle", "question"}, ...]} with texts'
        raise ProfileError(problem, option="needles", value=str(path)) from error
    if not needles or len({needle.id for needle in needles}) != len(needles):
        raise ProfileError("holds no needle, or one id twice", option="needles", value=str(path))
    for needle in needles:
        if not (needle.question and needle.news):
            problem = f": {needle.id!r} has no question, or one that gives it all away"
            raise ProfileError(problem, option="needles", value=str(path))
    return needles


def split_needles(needles: list[Needle]) -> tuple[list[Needle], list[Needle]]:
    """(to calibrate with, to verify with): every third is held out where that leaves enough; else all serve both."""
    if len(needles) < 9:
        return needles, needles
    held_out = needles[2::3]
    return [needle for needle in needles if needle not in held_out], held_out


_LONGEST_SENTENCE = 600  # characters


def read_haystack(paths: Sequence[Path] = ()) -> list[str]:
    """Sentences to hide needles between: of text files or folders of them, or of Python's own help topics.

    Raises:
        ProfileError: a path is missing or is not text.
    """
    if not paths:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    else:
        files = [file for path in paths for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
        texts = [_read_text(file) for file in files]
    # Ends of sentences and of paragraphs; white space inside a sentence is layout, not content.
    pieces = (" ".join(piece.split()) for text in texts for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    # Text without ends of sentences, such as code or Chinese, is cut by length.
    sentences = [part for piece in pieces for part in textwrap.wrap(piece, _LONGEST_SENTENCE)]
    if not sentences:
        raise ProfileError("holds no text", option="haystack", value=[str(path) for path in paths])
    return sentences


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except PromptError as error:
        raise ProfileError(error.problem, option="haystack", value=str(file)) from error


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
    ) -> Document:
        """A text from an offset set by `rotation`, with needles at the depths.

        Args:
            length: tokens of the prompt and its answer: the document is a little shorter, never longer.
            rotation: each needle stands at each depth once over as many as there are needles, or depths if more.
            reserved: how many of these tokens the chat template, the question and the answer take.
        Raises:
            ProfileError: the haystack is shorter than that.
            ConfigError: the length leaves no room for text beside the needles.
        """
        if self.num_tokens < length:
            raise ProfileError(
                f"the haystack has {self.num_tokens} tokens, fewer than the longest length {length}: "
                "give a longer haystack or smaller lengths"
            )
        placed = _placed(rotation, depths, needles)
        encoded = self._tokenizer([f" {needle.needle}" for _, needle in placed], add_special_tokens=False)
        wanted = length - reserved - sum(len(ids) for ids in encoded["input_ids"])
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
        return Document(f"{length}-{rotation}", " ".join(sentences), placed)


def _placed(rotation: int, depths: Sequence[float], needles: list[Needle]) -> tuple[tuple[float, Needle], ...]:
    """(depth, needle), by depth; the longer of the two lists is rotated, so that each meets each."""
    count = min(len(depths), len(needles))
    turn = [(rotation + i) % max(len(depths), len(needles)) for i in range(count)]
    if len(depths) > len(needles):
        pairs = [(depths[at], needles[i]) for i, at in enumerate(turn)]
    else:
        pairs = [(depths[i], needles[at]) for i, at in enumerate(turn)]
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


def question_tokens(tokenizer: PreTrainedTokenizerBase, needles: list[Needle]) -> int:
    """Tokens of a prompt beside its document: the chat template's and the longest question's."""
    questions = [*(_QUESTION.format(question=needle.question) for needle in needles), SUMMARY]
    return max(len(encode_request(tokenizer, ".", question).input_ids) for question in questions)


def encode_request(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> Message:
    """A text and a question on it, as `compresskv ask` puts them to the model.

    Raises:
        PromptError: the chat template or the tokenizer loses either.
    """
    content = f"{text}\n\n{question}"
    message = encode_message(tokenizer, content, plain_end="\n")
    message.check_holds("document", 0, len(text))
    message.check_holds("question", len(content) - len(question), len(content))
    return message


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, document: Document, questions: list[tuple[str, str]]
) -> tuple[list[int], list[Question]]:
    """Token ids of a document and of questions on it.

    Args:
        questions: (question as sent, the needle's text or '' where the whole text is meant).
    Returns: (the longest prefix that all the prompts share, one `Question` each).
    Raises:
        ModelError: the tokenizer cannot tell which characters a token stands for.
        PromptError: as for `encode_request`.
    """
    prompts: list[tuple[list[int], slice]] = []
    for question, needle in questions:
        message = encode_request(tokenizer, document.text, question)
        start = document.text.index(needle)
        span = message.tokens_of(start, start + len(needle)) if needle else slice(0, 0)
        prompts.append((message.input_ids, span))
    longest_prefix = min(len(ids) for ids, _ in prompts) - _MIN_SUFFIX
    prefix_length = 0
    while prefix_length < longest_prefix and len({ids[prefix_length] for ids, _ in prompts}) == 1:
        prefix_length += 1
    prefix = prompts[0][0][:prefix_length]
    return prefix, [Question(ids[prefix_length:], span) for ids, span in prompts]


def words(text: str) -> list[str]:
    """Lower-case words and numbers, as ROUGE compares them."""
    return "".join(char if char.isalnum() else " " for char in text.lower()).split()
