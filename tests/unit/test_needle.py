"""What the needle benchmark hides, where it stands, and which answers count."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import planted
from compresskv.calibration.haystack import read_haystack
from compresskv.calibration.needles import read_needles
from compresskv.calibration.recall import words
from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.metrics import contains
from compresskv.evaluation.tasks.needle import Fact, NeedleTask, evaluation_facts
from compresskv.evaluation.tasks.registry import create_task
from compresskv.prompts.template import encode_message

TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] | trim }}<end>\nassistant: {% endfor %}"
TOKENIZERS = {
    "words": planted.tokenizer(),
    "bytes": planted.bytes_tokenizer(),
    "bytes with a template": planted.bytes_tokenizer(TEMPLATE),
}
FACTS = evaluation_facts()
SUBSETS = ("single", "paraphrase", "multi", "uuid")
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
LENGTHS = (900, 2000)
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_LITTLE_WORDS = """
a an the of in on at to for by with and as or it its his her their they he she who whom whose what which where when why
how does do did is are was were be been must can have has had one all out that this these those two up down into from
back every each
"""
LITTLE_WORDS = set(_LITTLE_WORDS.split())


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write_haystack(tmp_path_factory.mktemp("haystack") / "text.txt", 600)


def cases(haystack: Path, tokenizer: str = "words", **changes: Any) -> list[Example]:
    options = {"haystack": (haystack,), "lengths": LENGTHS, "depths": DEPTHS, "limit": 2, **changes}
    return NeedleTask().examples(TaskSettings(TOKENIZERS[tokenizer], **options))


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def hidden(example: Example) -> list[str]:
    return [example.prompt[start:end] for start, end in example.evidence]


def content(text: str) -> set[str]:
    """Stems of the words that say something."""
    return {word[:5] for word in words(text) if word not in LITTLE_WORDS}


class TestFacts:
    def test_there_are_many_of_both_kinds_each_with_its_own_topic(self) -> None:
        assert len(FACTS) >= 40
        assert sum(fact.kind == "paraphrase" for fact in FACTS) >= 12
        assert {fact.kind for fact in FACTS} == {"fact", "paraphrase"}
        for part in ("id", "needle", "question", "answer"):
            assert len({getattr(fact, part) for fact in FACTS}) == len(FACTS)

    @pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
    def test_a_needle_is_a_plain_sentence_whose_question_keeps_the_answer_back(self, fact: Fact) -> None:
        assert "".join(map(str, vars(fact).values())).isascii()
        assert 8 <= len(fact.needle.split()) <= 25
        assert fact.needle.endswith(".")
        assert fact.question.endswith("?")
        assert fact.answer in fact.needle
        assert contains(fact.needle, fact.answer) == 1
        assert not content(fact.answer) & content(fact.question)

    @pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
    def test_the_kind_tells_whether_the_question_repeats_words_of_the_needle(self, fact: Fact) -> None:
        shared = content(fact.needle) & content(fact.question)
        assert len(shared) >= 2 if fact.kind == "fact" else not shared

    def test_no_answer_stands_in_another_needle(self) -> None:
        assert not [
            (fact.id, other.id)
            for fact in FACTS
            for other in FACTS
            if fact != other and contains(f"{other.needle} {other.question}", fact.answer)
        ]

    def test_none_resembles_another_or_one_that_profiles_are_calibrated_with(self) -> None:
        calibrated = read_needles()
        assert not {fact.id for fact in FACTS} & {needle.id for needle in calibrated}
        for i, fact in enumerate(FACTS):
            for other in [*calibrated, *FACTS[:i]]:
                assert len(content(fact.needle) & content(other.needle)) <= 2, (fact.id, other.id)

    def test_the_default_haystack_does_not_give_an_answer(self) -> None:
        text = " ".join(read_haystack())
        assert not [fact.id for fact in FACTS if contains(text, fact.answer)]


class TestCases:
    def test_the_task_is_known_by_its_name(self) -> None:
        assert isinstance(create_task("needle"), NeedleTask)

    def test_the_grid_is_whole_and_in_order_and_every_id_is_its_own(self, haystack: Path) -> None:
        examples = cases(haystack)
        expected = [
            (f"needle/{subset}", f"{length}-{depth:g}-{number}")
            for subset in SUBSETS
            for length in LENGTHS
            for depth in DEPTHS
            for number in range(2)
        ]
        assert [(example.task, example.id) for example in examples] == expected
        assert len(cases(haystack, limit=None)) == len(expected) / 2

    def test_only_the_asked_subsets(self, haystack: Path) -> None:
        assert {example.task for example in cases(haystack, subsets=("multi",))} == {"needle/multi"}
        with pytest.raises(ConfigError, match="'singel': did you mean 'single'"):
            cases(haystack, subsets=("singel",))

    @pytest.mark.parametrize("tokenizer", TOKENIZERS)
    def test_prompt_and_answer_are_almost_as_long_as_asked_and_never_longer(
        self, haystack: Path, tokenizer: str
    ) -> None:
        line = count(TOKENIZERS[tokenizer], f'"{"0" * 36}": "{"0" * 36}"\n')
        for example in cases(haystack, tokenizer):
            length = len(encode_message(TOKENIZERS[tokenizer], example.prompt).input_ids)
            length += example.max_new_tokens
            slack = max(80, 2 * line) if example.task == "needle/uuid" else 80
            assert example.meta["length"] - slack < length <= example.meta["length"]

    def test_evidence_is_the_hidden_text_and_stands_in_the_document_once(self, haystack: Path) -> None:
        needles = {fact.needle: fact for fact in FACTS}
        for example in cases(haystack):
            assert example.prompt == example.context + example.suffix
            assert " ".join(hidden(example)) == example.meta["reference"]
            assert len(hidden(example)) == len(example.answers) == (3 if example.task == "needle/multi" else 1)
            for text, answer in zip(hidden(example), example.answers, strict=True):
                assert example.prompt.count(text) == example.context.count(text) == 1
                assert example.context.count(answer) == 1
                if example.task != "needle/uuid":
                    assert needles[text].answer == answer
                    assert needles[text].question in example.suffix

    def test_sentences_and_lines_stay_whole(self, haystack: Path) -> None:
        whole = {*read_haystack([haystack]), *(fact.needle for fact in FACTS)}
        for example in cases(haystack):
            if example.task == "needle/uuid":
                lines = example.context.split("\n")
                assert all(re.fullmatch(f'"{UUID.pattern}": "{UUID.pattern}"', line) for line in lines)
                assert len(set(UUID.findall(example.context))) == 2 * len(lines)
            else:
                assert set(re.split(r"(?<=\.) ", example.context)) <= whole

    @pytest.mark.parametrize("tokenizer", TOKENIZERS)
    def test_what_is_hidden_stands_at_its_depth_within_a_sentence_or_a_line(
        self, haystack: Path, tokenizer: str
    ) -> None:
        for example in cases(haystack, tokenizer):
            start, end = example.evidence[0] if len(example.evidence) == 1 else (0, 0)
            if end:
                depth = 100 * start / (len(example.context) - (end - start))
                assert depth == pytest.approx(example.meta["depth"], abs=100 * 200 / len(example.context))
            if example.meta["depth"] == 0:
                assert example.context.startswith(tuple(hidden(example)))
            if example.meta["depth"] == 100:
                assert example.context.endswith(tuple(hidden(example)))

    def test_several_needles_are_spread_evenly_with_one_at_the_cases_depth(self, haystack: Path) -> None:
        for example in cases(haystack, subsets=("multi",), lengths=(4000,)):
            depth = example.meta["depth"]
            wanted = sorted([depth, (depth + 100 / 3) % 100, (depth + 200 / 3) % 100])
            found = sorted(100 * start / len(example.context) for start, _ in example.evidence)
            assert found == pytest.approx(wanted, abs=4)

    def test_the_same_settings_make_the_same_cases_and_another_seed_others(self, haystack: Path) -> None:
        assert cases(haystack) == cases(haystack)
        others = cases(haystack, seed=1)
        for one, other in zip(cases(haystack), others, strict=True):
            assert one.id == other.id
            assert one.context != other.context

    def test_a_case_does_not_depend_on_the_rest_of_the_grid(self, haystack: Path) -> None:
        known = {(example.task, example.id): example for example in cases(haystack)}
        for example in cases(haystack, lengths=(2000,), depths=(75, 50.0), limit=1):
            assert known[example.task, example.id] == example

    def test_cases_differ_in_what_they_hide_and_in_the_text_around_it(self, haystack: Path) -> None:
        for subset in SUBSETS:
            for length in LENGTHS:
                examples = cases(haystack, subsets=(subset,), lengths=(length,), limit=3)
                assert len({example.meta["reference"] for example in examples}) == len(examples)
                rest = {example.context.replace(example.meta["reference"], "")[-300:] for example in examples}
                assert len(rest) == len(examples)

    def test_lengths_and_depths_asked_for_twice_are_run_once(self, haystack: Path) -> None:
        assert len(cases(haystack, lengths=(900, 900), depths=(50, 50.0), limit=1)) == len(SUBSETS)

    def test_questions_and_answers_have_the_form_that_was_agreed(self, haystack: Path) -> None:
        single, paraphrase, multi, uuid = cases(haystack, lengths=(900,), depths=(50.0,), limit=1)
        assert [example.max_new_tokens for example in (single, multi, uuid)] == [32, 96, 48]
        assert re.fullmatch(r"\n\n.*\? Answer in one sentence\.", single.suffix)
        assert re.fullmatch(r"\n\n.*numbered list.*\n1\. .*\?\n2\. .*\?\n3\. .*\?", multi.suffix)
        assert uuid.suffix.startswith("\n\n")
        assert UUID.findall(uuid.suffix) == UUID.findall(uuid.meta["reference"])[:1]
        assert uuid.answers == tuple(UUID.findall(uuid.meta["reference"])[1:])
        assert uuid.meta["kind"] == "uuid"
        assert [example.meta["kind"] for example in (single, paraphrase, multi)] == ["fact", "paraphrase", "fact"]
        for example in (single, multi, uuid):
            assert example.chat
            assert json.loads(json.dumps(example.meta)) == example.meta


class TestRefusals:
    @pytest.mark.parametrize("subset", SUBSETS)
    def test_a_length_without_room_is_refused_by_name(self, haystack: Path, subset: str) -> None:
        with pytest.raises(ConfigError, match=rf"^lengths=60 .*{subset}") as caught:
            cases(haystack, subsets=(subset,), lengths=(60,))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("depth", [-1.0, 100.5, float("nan")])
    def test_a_depth_that_is_no_percentage_is_refused(self, haystack: Path, depth: float) -> None:
        with pytest.raises(ConfigError, match=f"^depths={depth} "):
            cases(haystack, depths=(depth,))

    def test_a_short_haystack_is_refused(self, tmp_path: Path) -> None:
        short = planted.write_haystack(tmp_path / "short.txt", 20)
        with pytest.raises(DataError, match=r"fewer than the longest length 900: .*haystack .*lengths"):
            cases(short)

    def test_a_missing_haystack_is_refused_and_not_looked_for_where_nothing_is_hidden_in_it(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match=r"^haystack=.*missing\.txt"):
            cases(tmp_path / "missing.txt")
        assert cases(tmp_path / "missing.txt", subsets=("uuid",))


def example(subset: str, *answers: str, reference: str = "") -> Example:
    return Example(f"needle/{subset}", "0", "", "", "", answers, 32, meta={"reference": reference or " ".join(answers)})


class TestScores:
    def test_every_needle_is_its_own_right_answer_and_no_other_needles(self) -> None:
        for fact in FACTS:
            case = example("single", fact.answer, reference=fact.needle)
            assert set(NeedleTask().score(case, fact.needle).values()) == {1.0}
            assert NeedleTask().score(case, f"It is {fact.answer.upper()}!")["score"] == 1.0
            assert NeedleTask().score(case, fact.question)["score"] == 0.0

    @pytest.mark.parametrize("prediction", ["", " ", "\n", "...", "?!", "- - -", '""', "the"])
    @pytest.mark.parametrize("subset", SUBSETS)
    def test_nothing_said_scores_nothing(self, subset: str, prediction: str) -> None:
        score = NeedleTask().score(example(subset, "a brass lever", "moths"), prediction)
        assert score == {"score": 0.0, "exact_match": 0.0, "rouge_1_recall": 0.0}

    @pytest.mark.parametrize(
        ("prediction", "found"),
        [("The Brass Lever.", 1), ("a brass, lever", 1), ("the brass levers", 0), ("lever of brass", 0), ("brass", 0)],
    )
    def test_the_answers_words_count_only_whole_and_in_a_row(self, prediction: str, found: float) -> None:
        assert NeedleTask().score(example("single", "brass lever"), prediction)["score"] == found

    def test_several_answers_count_each_and_only_all_of_them_match(self) -> None:
        case = example("multi", "moths", "celery", "brass lever")
        assert NeedleTask().score(case, "1. Celery\n2. moths\n3. a lever") == pytest.approx(
            {"score": 2 / 3, "exact_match": 0, "rouge_1_recall": 3 / 4}
        )
        assert NeedleTask().score(case, "1. Moths\n2. celery\n3. the brass lever")["exact_match"] == 1

    def test_a_value_counts_only_letter_for_letter(self, haystack: Path) -> None:
        (case,) = cases(haystack, subsets=("uuid",), lengths=(900,), depths=(50.0,), limit=1)
        (value,) = case.answers
        assert NeedleTask().score(case, f'"{value}".')["score"] == 1
        assert NeedleTask().score(case, f'{{"value":"{value}"}}')["exact_match"] == 1
        for wrong in (value[:-1], value.replace("-", ""), value.replace("-", " "), case.context.split('"')[1]):
            assert NeedleTask().score(case, wrong)["score"] == 0

    @given(st.text(), st.sampled_from(FACTS), st.sampled_from(SUBSETS))
    def test_scores_are_shares_by_the_names_that_are_told(self, prediction: str, fact: Fact, subset: str) -> None:
        scores = NeedleTask().score(example(subset, fact.answer, "moths", reference=fact.needle), prediction)
        assert scores.keys() == NeedleTask.metrics.keys()
        assert all(0 <= value <= 1 for value in scores.values())
        assert scores["exact_match"] == float(scores["score"] == 1)

    @given(st.text(alphabet=" .,;\n-x"), st.sampled_from(FACTS))
    def test_what_is_said_around_an_answer_does_not_matter(self, around: str, fact: Fact) -> None:
        assert NeedleTask().score(example("single", fact.answer), f"{around} {fact.answer} {around}")["score"] == 1
