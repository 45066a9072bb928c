"""BABILong: prompts that ask without giving the answer away, and scores that a guess does not earn."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.tasks.babilong import BABILong
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.registry import create_task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROW = {"input": "It rained. Ann went to the garden.", "question": "Where is Ann? ", "target": "garden"}


def write(data: Path, name: str, *rows: object) -> None:
    path = data / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def examples(data: Path | None, *subsets: str, limit: int | None = None) -> list[Example]:
    # A task that takes its prompts from files needs no tokenizer.
    return BABILong().examples(TaskSettings(None, data=data, subsets=subsets, limit=limit))  # type: ignore[arg-type]


def scores(prediction: str, target: str = "garden", question: str = "Where is Ann?") -> dict[str, float]:
    example = Example("babilong/qa1-1k", "1", "", "A text.", f"\nQuestion: {question}\nAnswer:", (target,), 15)
    return BABILong().score(example, prediction)


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    write(tmp_path, "babilong/2k/qa1", ROW, ROW)
    first, second = examples(tmp_path)
    assert (first.task, first.id, second.id) == ("babilong/qa1-2k", "1", "2")
    assert first.context == ROW["input"]
    assert first.suffix.endswith("Question: Where is Ann?\nAnswer:")
    assert (first.answers, first.max_new_tokens, first.chat, first.meta) == (("garden",), 15, True, {"length": 2000})


def test_the_files_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path, "babilong/2k/qa1", ROW)
    assert examples(tmp_path) == examples(tmp_path / "babilong")


def test_subsets_and_limit(tmp_path: Path) -> None:
    for name in ("1k/qa2", "1k/qa1", "0k/qa5"):
        write(tmp_path, name, ROW, ROW)
    assert [example.task for example in examples(tmp_path, limit=1)] == [
        "babilong/qa5-0k",
        "babilong/qa1-1k",
        "babilong/qa2-1k",
    ]
    assert [example.id for example in examples(tmp_path, "qa2-1k")] == ["1", "2"]
    with pytest.raises(DataError, match=r"no 4k/qa1\.jsonl$"):
        examples(tmp_path, "qa2-1k", "qa1-4k")
    with pytest.raises(ConfigError, match="has no subset 'qa9-1k'"):
        examples(tmp_path, "qa9-1k")


def test_braces_in_the_data_mean_nothing(tmp_path: Path) -> None:
    write(tmp_path, "1k/qa1", ROW | {"input": "{x} {", "question": "{question} }?"})
    (example,) = examples(tmp_path)
    assert example.context == "{x} {"
    assert "Question: {question} }?\n" in example.suffix


@pytest.mark.parametrize("data", [None, "nothing", "."])
def test_no_data(tmp_path: Path, data: str | None) -> None:
    with pytest.raises(DataError) as err:
        examples(data and tmp_path / data)  # type: ignore[arg-type]
    assert "\n" not in str(err.value)
    assert "k/qa1.jsonl" in str(err.value)


@pytest.mark.parametrize("field", ROW)
def test_malformed_row(tmp_path: Path, field: str) -> None:
    for changed in (3, " "):
        write(tmp_path, "1k/qa1", ROW, ROW | {field: changed})
        with pytest.raises(DataError, match=rf"^1k/qa1\.jsonl line 2: field '{field}' is "):
            examples(tmp_path)
    write(tmp_path, "1k/qa1", {name: text for name, text in ROW.items() if name != field})
    with pytest.raises(DataError, match=rf"^1k/qa1\.jsonl line 1: field '{field}' is missing$"):
        examples(tmp_path)


@pytest.mark.parametrize(
    ("prediction", "score", "contains"),
    [
        ("garden", 1, 1),
        (" The Garden.", 1, 1),
        ("**garden**", 1, 1),
        ("Ann is in the garden. Before that she was in the kitchen.", 1, 1),
        ("\n\ngarden\nQuestion: Where is Bob?\nAnswer: office", 1, 1),
        ("garden or kitchen", 0, 1),  # a guess
        ("kitchen. No, garden.", 0, 1),
        ("kitchen", 0, 0),
        ("gardening", 0, 0),
        ("", 0, 0),
        ("...", 0, 0),
    ],
)
def test_score(prediction: str, score: float, contains: float) -> None:
    assert scores(prediction) == {"score": score, "contains": contains}


def test_a_place_in_the_question_is_no_guess() -> None:
    question = "Where was the ball before the kitchen?"
    assert scores("It was in the garden before the kitchen", question=question)["score"] == 1
    assert scores("It was in the office before the kitchen", question=question)["score"] == 0


def test_people_and_things() -> None:
    question = "Who gave the milk to Fred?"
    assert scores("Mary gave the milk to Fred", "Mary", question)["score"] == 1
    assert scores("Mary or Jeff", "Mary", question)["score"] == 0


def test_other_targets_need_only_occur() -> None:
    assert scores("yes, in the garden", "yes")["score"] == 1
    assert scores("yesterday", "yes")["score"] == 0


def test_the_prompt_names_no_candidate(tmp_path: Path) -> None:
    """It would be taken for part of the question."""
    write(tmp_path, "1k/qa1", ROW)
    (example,) = examples(tmp_path)
    for place in ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office", "Mary", "apple", "football", "milk"):
        assert place.lower() not in (example.prefix + example.suffix).lower()


@given(prediction=st.text(), target=st.text(min_size=1))
def test_every_prediction_has_a_score(prediction: str, target: str) -> None:
    for answer in (target, "garden", "Mary"):
        assert set(scores(prediction, answer)) == set(BABILong.metrics)
        assert all(score in (0, 1) for score in scores(prediction, answer).values())


@pytest.mark.skipif(not (SHARED / "babilong").is_dir(), reason="BABILong's rows are not beside the checkout")
def test_real_rows() -> None:
    cases = examples(SHARED)
    assert len({(example.task, example.id) for example in cases}) == len(cases) > 0
    task = create_task("babilong")
    for example in cases:
        assert task.score(example, f"{example.answers[0].title()}.\n") == {"score": 1, "contains": 1}
        assert task.score(example, "") == {"score": 0, "contains": 0}
