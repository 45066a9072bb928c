"""Variable tracking: what the chain says, where it stands, how long the prompt is, and what counts as an answer."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planted
from compresskv.errors import ConfigError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.example import Example
from compresskv.evaluation.task import TaskSettings, create_task
from compresskv.evaluation.tasks.ruler import RulerTask

TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] | trim }}<end>\nassistant: {% endfor %}"
TOKENIZERS = [planted.bytes_tokenizer(), planted.bytes_tokenizer(TEMPLATE)]


def examples(tokenizer: int = 0, seed: int = 0, lengths: tuple[int, ...] = (3000,), limit: int = 2) -> list[Example]:
    task = create_task("ruler")
    assert isinstance(task, RulerTask)
    return task.examples(TaskSettings(TOKENIZERS[tokenizer], lengths=lengths, limit=limit, seed=seed))


@given(st.integers(0, 10**6), st.sampled_from([2500, 5000]))
def test_the_answer_is_what_following_the_assignments_gives(seed: int, length: int) -> None:
    for example in examples(seed=seed, lengths=(length,)):
        values: dict[str, str] = {}
        for name, given_value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", example.context, re.MULTILINE):
            values[name] = values.get(given_value, given_value)  # a chain is in order: each name is known when used
        wanted = re.search(r"assigned the value (\d{5}) in the text above", example.suffix)
        assert wanted is not None
        assert set(values.values()) == {wanted[1]}
        assert sorted(values) == sorted(example.answers)
        assert example.suffix.endswith(f"{len(values)} variables are assigned the value {wanted[1]}, they are:")
        assert not set(example.answers) & set(re.findall(r"\w+", example.prefix)), "the solved example gives it away"


@pytest.mark.parametrize("tokenizer", [0, 1])
def test_the_evidence_is_the_chain_and_the_prompt_fills_its_length(tokenizer: int) -> None:
    for example in examples(tokenizer, lengths=(2500, 4000)):
        lines = [example.prompt[start:end] for start, end in example.evidence]
        assert [line.split()[1] for line in lines] == list(example.answers)
        assert all(line in example.context.splitlines() for line in lines)
        prompt = encode(TOKENIZERS[tokenizer], example, None)
        unused = example.meta["length"] - len(prompt.input_ids) - example.max_new_tokens
        assert 0 <= unused < 100, "another line of noise would have fitted"


def test_a_case_is_the_same_whatever_others_are_run() -> None:
    both = {example.id: example for example in examples(lengths=(2500, 3000), limit=2)}
    assert both["3000-0"] == examples(lengths=(3000,), limit=1)[0]
    assert len({example.answers for example in both.values()}) == 4
    assert examples(seed=1)[0].answers != examples(seed=0)[0].answers


def test_each_variable_that_is_named_counts() -> None:
    example = examples()[0]
    task = create_task("ruler")
    assert task.score(example, " ".join(example.answers))["score"] == 1
    assert task.score(example, f"they are {example.answers[3]}, {example.answers[1]}.")["score"] == pytest.approx(0.4)
    assert task.score(example, "")["score"] == 0


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="lengths=700 leaves no room"):
        examples(lengths=(700,))
