"""Scores of one answer, each in 0..1. LongBench's metrics agree with its own code (Bai et al., arXiv 2308.14508)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rouge import Rouge

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CODE = ("`", "#", "//")
"""What marks a line as a fence or a comment, wherever it stands in the line."""


def best_of(metric: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """The score against the answer that fits best."""
    return max((metric(prediction, answer) for answer in answers), default=0.0)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single blanks (SQuAD's rule)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_line(prediction: str) -> str:
    """The first line that is not empty: few-shot answers go on with made-up examples."""
    return prediction.lstrip("\n").split("\n")[0]


def contains(prediction: str, answer: str) -> float:
    """Whether the answer's words stand in the prediction one after another, both normalised."""
    wanted = normalize_answer(answer)
    return float(wanted != "" and f" {wanted} " in f" {normalize_answer(prediction)} ")


def qa_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words, each counted as often as it occurs."""
    given, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L's F over the sentences of both, as the `rouge` package computes it."""
    if not prediction.replace(".", "").strip():
        return 0.0
    try:
        scores = Rouge(metrics=["rouge-l"]).get_scores(prediction, answer, avg=True)
    except (ValueError, RecursionError):  # an answer of dots, or a sentence of about 1000 words: LongBench's 0, too
        return 0.0
    return float(scores["rouge-l"]["f"])


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1/n where n classes are named in the prediction, the right one among them; case counts.

    A class whose name is part of the right one's is not counted: whoever names the right one names it as well.
    """
    named = {name for name in all_classes if name in prediction and not (name in answer and name != answer)}
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the one in the answer, 'Paragraph 7'."""
    wanted = re.search(r"Paragraph (\d+)", answer)
    return count(prediction, wanted[1]) if wanted else 0.0


def code_sim(prediction: str, answer: str) -> float:
    """Likeness of the first line that is code to the answer: 2 LCS / (len + len), in whole per cents.

    Same as fuzzywuzzy's `ratio` with python-Levenshtein; without it that package takes difflib, which gives less.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    if not line or not prediction.strip():
        return 0.0
    chars = len(line) + len(answer)
    unlike = chars - 2 * _common_length(line, answer)
    return round(100 * (1 - unlike / chars)) / 100  # in Levenshtein's order: another rounds some halves another way


def _common_length(first: str, second: str) -> int:
    """Length of the longest common subsequence (bit-parallel: Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, char in enumerate(first):
        places[char] = places.get(char, 0) | 1 << i
    row = ones = (1 << len(first)) - 1  # a zero bit for each step that the subsequence grows by
    for char in second:
        matches = row & places.get(char, 0)
        row = (row + matches | row - matches) & ones
    return (ones ^ row).bit_count()
