"""Several questions on one document: the document is the same for all, and knows nothing of them."""

from pathlib import Path

import pytest

import planted
from compresskv.errors import ConfigError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.questions import QuestionsTask

TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] | trim }}<end>\nassistant: {% endfor %}"
TOKENIZERS = [planted.bytes_tokenizer(), planted.bytes_tokenizer(TEMPLATE)]


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write_haystack(tmp_path_factory.mktemp("haystack") / "text.txt", 600)


def examples(haystack: Path, tokenizer: int = 0, **changes: object) -> list[Example]:
    options = {"haystack": (haystack,), "lengths": (2000, 3000), "limit": 2, **changes}
    return QuestionsTask().examples(TaskSettings(TOKENIZERS[tokenizer], **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", [0, 1])
def test_five_questions_share_the_tokens_of_a_document_that_fills_its_length(haystack: Path, tokenizer: int) -> None:
    found = examples(haystack, tokenizer)
    assert len(found) == 2 * 2 * 2 * 5  # subsets, lengths, documents, questions
    for at in range(0, len(found), 5):
        asked = found[at : at + 5]
        prompts = [encode(TOKENIZERS[tokenizer], example, None) for example in asked]
        assert len({tuple(prompt.document) for prompt in prompts}) == 1
        assert len({example.suffix for example in asked}) == len({example.answers for example in asked}) == 5
        unused = [
            example.meta["length"] - len(prompt.input_ids) - example.max_new_tokens
            for example, prompt in zip(asked, prompts, strict=True)
        ]
        assert 0 <= min(unused) < 100
    assert len({example.context for example in found}) == len(found) // 5


def test_the_evidence_holds_the_answer_and_the_facts_lie_all_over_the_document(haystack: Path) -> None:
    for example in examples(haystack):
        ((start, end),) = example.evidence
        assert example.answers[0] in example.prompt[start:end] == example.meta["reference"]
        assert example.answers[0] not in example.suffix
    starts = sorted(example.evidence[0][0] / len(example.context) for example in examples(haystack, limit=1)[:5])
    assert all(abs(start - (step + 0.5) / 5) < 0.1 for step, start in enumerate(starts))


def test_a_case_is_the_same_whatever_others_are_run(haystack: Path) -> None:
    both = {(one.task, one.id): one for one in examples(haystack)}
    alone = examples(haystack, lengths=(3000,), subsets=("paraphrases",))
    assert [both[one.task, one.id] for one in alone] == alone
    assert examples(haystack, seed=1)[0].answers != examples(haystack)[0].answers


def test_an_answer_counts_where_its_key_words_stand_in_it(haystack: Path) -> None:
    example, task = examples(haystack)[0], QuestionsTask()
    assert task.score(example, f"It is {example.answers[0]}!")["score"] == 1
    assert task.score(example, "It is.")["score"] == 0


def test_a_length_without_room_is_refused(haystack: Path) -> None:
    with pytest.raises(ConfigError, match="lengths=250 leaves no room"):
        examples(haystack, lengths=(250,))
