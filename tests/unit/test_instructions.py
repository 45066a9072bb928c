"""Rules at the beginning of a prompt: what follows them, where they stand, how long the prompt is."""

import random
from pathlib import Path

import pytest

import planted
from compresskv.errors import ConfigError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.instructions import InstructionsTask
from compresskv.evaluation.tasks.rules import Rule, draw_rules

TOKENIZER = planted.bytes_tokenizer()


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write_haystack(tmp_path_factory.mktemp("haystack") / "text.txt", 600)


def examples(haystack: Path, **changes: object) -> list[Example]:
    options = {"haystack": (haystack,), "lengths": (3000, 4000), "limit": 2, **changes}
    return InstructionsTask().examples(TaskSettings(TOKENIZER, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "value", "follows", "breaks"),
    [
        ("begins", "wolf", ["Wolf, said he.", '["WOLF" it is]'], ["A wolf.", "Wolfgang spoke.", ""]),
        ("ends", "odd river", ["It is an odd river.", "AN ODD RIVER]"], ["odd river banks", "odd rivers", ""]),
        ("mentions", "canyon", ["The Canyon is deep."], ["canyons", ""]),
        ("number", "1234", ["No. 1234!"], ["12345", "1 234", ""]),
        ("signed", "tiger", ["Yours, Tiger"], ["tigers", ""]),
        ("letters", "capital", ["ALL OF IT, 12."], ["Not all", "12", ""]),
        ("letters", "small", ["all of it, 12."], ["Not all", "12", ""]),
        ("brackets", "brackets", ["[all of it]", " [x]\n"], ["[a] and b", "(a)", "[]", ""]),
    ],
)
def test_code_tells_what_follows_a_rule(kind: str, value: str, follows: list[str], breaks: list[str]) -> None:
    rule = Rule(kind, "", value)
    assert all(rule.followed(answer) for answer in follows)
    assert not any(rule.followed(answer) for answer in breaks)


def test_one_answer_can_follow_all_rules() -> None:
    for seed in range(20):
        rules = draw_rules(random.Random(seed), 5)
        assert len({rule.kind for rule in rules}) == 5
        value = {rule.kind: rule.value for rule in rules}
        words = [value.get("begins", ""), value.get("mentions", ""), value.get("number", "")]
        words += [f"yours, {value.get('signed', '')}", value.get("ends", "")]
        answer = f"[{' '.join(words)}]"
        answer = answer.upper() if value.get("letters") == "capital" else answer
        assert all(rule.followed(answer) for rule in rules)
        assert all(rule.value in rule.text.lower() for rule in rules)


def test_rules_begin_the_prompt_and_the_document_fills_its_length(haystack: Path) -> None:
    for example in examples(haystack):
        lines = [example.prompt[start:end] for start, end in example.evidence]
        assert lines == [rule["text"] for rule in example.meta["rules"]]
        assert len(lines) == len(set(lines)) == 5
        assert max(end for _, end in example.evidence) <= len(example.prefix)
        assert not any(line in example.context + example.suffix for line in lines)
        prompt = encode(TOKENIZER, example, None)
        assert 0 <= example.meta["length"] - len(prompt.input_ids) - example.max_new_tokens < 100
        assert prompt.suffix_start < len(prompt.input_ids)


def test_scores_count_rules(haystack: Path) -> None:
    task = InstructionsTask()
    followed, repeated = examples(haystack, lengths=(3000,), limit=1)
    assert (followed.task, repeated.task) == ("instructions/followed", "instructions/repeated")
    assert task.score(repeated, " ".join(repeated.answers)) == {"score": 1, "exact_match": 1}
    assert task.score(repeated, f"The first is {repeated.answers[0]}.")["score"] == pytest.approx(0.2)
    for example in (followed, repeated):
        assert task.score(example, "") == {"score": 0, "exact_match": 0}
    wanted = [Rule(**rule).followed("nothing at all") for rule in followed.meta["rules"]]
    assert task.score(followed, "nothing at all")["score"] == sum(wanted) / 5


def test_a_case_is_the_same_whatever_others_are_run(haystack: Path) -> None:
    both = {(one.task, one.id): one for one in examples(haystack)}
    assert both["instructions/repeated", "4000-1"] == examples(haystack, lengths=(4000,), subsets=("repeated",))[1]
    assert len({example.answers for example in both.values()}) == 8
    assert examples(haystack, seed=1)[0].answers != examples(haystack)[0].answers


def test_a_length_without_room_is_refused(haystack: Path) -> None:
    with pytest.raises(ConfigError, match="lengths=300 leaves no room"):
        examples(haystack, lengths=(300,))
