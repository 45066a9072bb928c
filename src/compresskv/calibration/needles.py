"""Calibration prompts: needles, the documents that they stand in, and questions that ask for them.

Several needles share one document, each at its own depth, so that one prefill serves a question for every needle. The
questions are asked one after another on the same prefilled document, each without the others. Differs from the
paper, which reads the whole prompt anew for each needle; measured, that costs as many prefills as there are questions.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from compresskv.calibration.recall import words
from compresskv.errors import ProfileError
from compresskv.prompts.template import Message, encode_message
from compresskv.system.inputs import read_json

DEFAULT_NEEDLES = Path(__file__).parent / "needles.json"
_QUESTION = "{question} Answer in one sentence."
_MIN_SUFFIX = 32  # tokens left to each question's own pass, so that an observation window fits into it
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
class NeedleDocument:
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
        data = read_json(path)
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


def longest_question(tokenizer: PreTrainedTokenizerBase, needles: list[Needle]) -> int:
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
    tokenizer: PreTrainedTokenizerBase, document: NeedleDocument, questions: list[tuple[str, str]]
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
