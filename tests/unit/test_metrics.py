"""Metrics against scores worked out by hand, and against properties that hold for every prediction."""

import difflib
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskv.calibration.recall import rouge_1_recall
from compresskv.evaluation.tasks import metrics

CLASSES = ["Date", "City", "Other entity", "Other", "Country"]
ALL: dict[str, Callable[[str, str], float]] = {
    "contains": metrics.contains,
    "qa_f1": metrics.qa_f1,
    "rouge_l": metrics.rouge_l,
    "rouge_1_recall": rouge_1_recall,
    "classification": partial(metrics.classification, all_classes=CLASSES),
    "count": metrics.count,
    "retrieval": metrics.retrieval,
    "code_sim": metrics.code_sim,
}
BY_HAND = [
    ("contains", "The  Nile.", "nile", 1),
    ("contains", "the", "a", 0),  # both are nothing once normalised
    ("contains", "It is in the Nile, I think.", "The Nile", 1),
    ("contains", "I know.", "no", 0),  # whole words
    ("contains", "Nile and Congo", "Nile Congo", 0),
    ("contains", "anything", "...", 0),
    ("qa_f1", "The answer is Apis.", "Apis", 1 / 2),  # 'the' goes: 1 of 3 and 1 of 1
    ("qa_f1", "no no no", "no", 1 / 2),  # a word counts as often as the answer has it
    ("qa_f1", "yes", "no", 0),
    ("qa_f1", "Twenty-one", "twentyone", 1),
    ("rouge_l", "a b c d", "a c d e", 3 / 4),
    ("rouge_l", "b a", "a b", 1 / 2),
    ("rouge_l", "x y. a b.", "a b. x y.", 1),  # sentences are matched each with each
    ("rouge_l", "A b", "a b", 1 / 2),  # case counts
    ("rouge_1_recall", "Red, RED and blue!", "blue red green", 2 / 3),
    ("rouge_1_recall", "anything", "...", 0),
    ("classification", "City", "City", 1),
    ("classification", "city", "City", 0),  # case counts
    ("classification", "City or Country", "City", 1 / 2),
    ("classification", "Other entity", "Other entity", 1),  # 'Other' is part of it
    ("classification", "Other entity", "Other", 1 / 2),
    ("classification", "River", "River", 0),  # no class
    ("count", "There are 11 of 15", "11", 1 / 2),
    ("count", "111", "11", 0),
    ("retrieval", "Paragraph 7", "Paragraph 7", 1),
    ("retrieval", "7", "Paragraph 7", 1),
    ("retrieval", "Paragraph 17, 7 or 8", "Paragraph 7", 1 / 3),
    ("retrieval", "7", "the seventh", 0),
    ("code_sim", "x = 1", "x = 1", 1),
    ("code_sim", "\n\n```python\n# note\n// note\nx = 1\n```", "x = 1", 1),
    ("code_sim", "x = 1\ny = 2", "y = 2", 0.6),  # only the first line; ' = ' is common
    ("code_sim", "ab", "ba", 0.5),
    ("code_sim", "abc", "abcd", 0.86),  # 6 / 7, in whole per cents
    ("code_sim", "x" * 3, "x" * 77, 0.07),  # 7.5 less a rounding error, as Levenshtein has it
    ("code_sim", "```", "x", 0),
]


@pytest.mark.parametrize(("name", "prediction", "answer", "score"), BY_HAND)
def test_metric_by_hand(name: str, prediction: str, answer: str, score: float) -> None:
    assert ALL[name](prediction, answer) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prediction", ["", " ", "\n\n", ".", "...", " . ", "?!", "\x00", "``", "\ud800"])
def test_no_answer_scores_nothing(name: str, prediction: str) -> None:
    answers = ["City", "11", "Paragraph 1", "One sentence. Another.\n", ""]
    if name == "code_sim":
        answers = ["x=1", ""]  # a dot may be part of the code
    assert metrics.best_of(ALL[name], prediction, answers) == 0


def test_code_marks_anywhere_hide_a_line() -> None:
    assert metrics.code_sim("x = 1  # one\ny = 2", "y = 2") == 1


def test_code_similarity_is_not_difflibs() -> None:
    first, second = "I do not know", "vertices[x] = new Vector3f();"
    assert difflib.SequenceMatcher(None, first, second).ratio() < metrics.code_sim(first, second)


def test_long_sentence_is_no_crash() -> None:
    """`rouge` recurses once a word."""
    for answer in ("y " * 20 + "x", "x " * 1100):
        assert 0 <= metrics.rouge_l("x " * 1100, answer) <= 1


def test_best_of_answers() -> None:
    assert metrics.best_of(metrics.qa_f1, "red fox", ["cat", "fox", "red fox"]) == 1
    assert metrics.best_of(metrics.qa_f1, "red fox", []) == 0


@pytest.mark.parametrize(
    ("prediction", "line"), [("\n\n City \nQuestion", " City "), ("", ""), ("\n", ""), (" \nx", " ")]
)
def test_answer_line(prediction: str, line: str) -> None:
    assert metrics.answer_line(prediction) == line


def longest_common_subsequence(first: str, second: str) -> int:
    """By the book: a table of all pairs of prefixes."""
    row = [0] * (len(second) + 1)
    for char in first:
        before = row
        row = [0]
        for j, other in enumerate(second):
            row.append(before[j] + 1 if char == other else max(before[j + 1], row[j]))
    return row[-1]


@given(st.text("abcé中", min_size=1, max_size=80), st.text("abc é", max_size=80))
def test_code_similarity_by_the_table(first: str, second: str) -> None:
    expected = 200 * longest_common_subsequence(first, second) / (len(first) + len(second))
    assert 100 * metrics.code_sim(first, second) == pytest.approx(expected, abs=0.5 + 1e-9)


WRITING = st.one_of(st.text(max_size=60), st.text(" .\n`#/-aA17é中", max_size=60), st.sampled_from(CLASSES))


@settings(max_examples=60)
@given(prediction=WRITING, answer=WRITING)
@pytest.mark.parametrize("name", ALL)
def test_every_prediction_has_a_score(name: str, prediction: str, answer: str) -> None:
    for text in (prediction, prediction + answer, answer):
        assert 0 <= ALL[name](text, answer) <= 1


@pytest.mark.parametrize("name", ["contains", "qa_f1", "rouge_l", "rouge_1_recall", "code_sim"])
@given(answer=st.text("abc d12", min_size=1, max_size=40).filter(lambda text: metrics.normalize_answer(text) != ""))
def test_the_answer_itself_scores_all(name: str, answer: str) -> None:
    assert ALL[name](answer, answer) == pytest.approx(1)


def test_a_metric_needs_nothing_of_what_calibration_measures() -> None:
    heavy = {"torch", "compresskv.calibration.measure"}
    code = f"import sys, compresskv.evaluation.tasks.metrics; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
