"""RULER's puzzles: what the answer is, where it stands, how long the prompt is, and what counts as an answer."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.ruler.words import ADJECTIVES, NOUNS, VERBS
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.registry import create_task
from compresskv.evaluation.tasks.ruler import RulerTask

TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] | trim }}<end>\nassistant: {% endfor %}"
TOKENIZERS = [planted.bytes_tokenizer(), planted.bytes_tokenizer(TEMPLATE)]
SUBSETS = RulerTask.default_subsets
MAGIC = [subset for subset in SUBSETS if subset.startswith("niah")]
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")


def examples(
    *subsets: str, tokenizer: int = 0, seed: int = 0, lengths: tuple[int, ...] = (4000,), limit: int = 2, **more: object
) -> list[Example]:
    task = create_task("ruler")
    assert isinstance(task, RulerTask)
    given_settings = {"subsets": subsets, "lengths": lengths, "limit": limit, "seed": seed, **more}
    return task.examples(TaskSettings(TOKENIZERS[tokenizer], **given_settings))  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2500, 5000]))
def test_the_answer_is_what_following_the_assignments_gives(seed: int, length: int) -> None:
    for example in examples("variable_tracking", seed=seed, lengths=(length,)):
        values: dict[str, str] = {}
        for name, given_value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", example.context, re.MULTILINE):
            values[name] = values.get(given_value, given_value)  # a chain is in order: each name is known when used
        wanted = re.search(r"assigned the value (\d{5}) in the text above", example.suffix)
        assert wanted is not None
        assert set(values.values()) == {wanted[1]}
        assert sorted(values) == sorted(example.answers)
        assert example.suffix.endswith(f"{len(values)} variables are assigned the value {wanted[1]}, they are:")
        assert not set(example.answers) & set(re.findall(r"\w+", example.prefix)), "the solved example gives it away"


@pytest.mark.parametrize(
    ("subset", "num_hidden", "num_answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", None, 1),
        ("niah_multikey_3", None, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_a_magic_value_is_that_of_the_keys_asked_for(subset: str, num_hidden: int | None, num_answers: int) -> None:
    for example in examples(subset, limit=3):
        found = NEEDLE.findall(example.context)
        assert len(found) == num_hidden or (num_hidden is None and len(found) > 10)
        asked = re.search(r"special magic (\w+) for (.*) mentioned in the provided text\?", example.suffix)
        assert asked is not None
        keys = re.split(r", (?:and )?", asked[2])
        wanted = [value for key in keys for _, own, value in found if own == key]
        assert sorted(wanted) == sorted(example.answers)
        assert len(set(wanted)) == num_answers
        kind = "uuids" if subset in ("niah_single_3", "niah_multikey_3") else "numbers"
        assert asked[1] == (kind if num_answers > 1 else kind.removesuffix("s"))
        verb = "are" if num_answers > 1 else "is"
        assert example.suffix.endswith(f"mentioned in the provided text {verb}")
        assert ("A special magic" in example.prefix) == (num_answers == 1)


@pytest.mark.parametrize("length", [3000, 9000])
def test_the_common_words_are_those_that_are_repeated_most(length: int) -> None:
    (example,) = examples("common_words", lengths=(length,), limit=1)
    words = re.findall(r"(\d+)\. ([a-z-]+)", example.context)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = Counter(word for _, word in words)
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    assert {word for word, count in counts.items() if count == often} == set(example.answers)
    assert set(counts.values()) == {often, seldom}
    assert len(example.answers) == 10
    assert len(re.findall(r"\b10\. ", example.prefix)) == 2, "a solved example precedes, with its ten words"


def test_words_are_pairs_where_single_ones_do_not_last() -> None:
    (example,) = examples("common_words", lengths=(30_000,), limit=1)
    assert all("-" in answer for answer in example.answers)


def test_the_frequent_words_are_those_that_occur_most_after_the_dots() -> None:
    for example in examples("frequent_words", lengths=(1500, 6000)):
        ranked = Counter(example.context.split()).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == example.answers
        assert ranked[3][1] > ranked[4][1], "which is third hangs on nothing but the count"


@pytest.mark.parametrize("tokenizer", [0, 1])
@pytest.mark.parametrize("subset", SUBSETS)
def test_the_evidence_stands_in_a_prompt_that_fills_its_length(subset: str, tokenizer: int) -> None:
    for example in examples(subset, tokenizer=tokenizer, lengths=(2500, 4000), limit=1):
        lines = [example.prompt[start:end] for start, end in example.evidence]
        if subset in MAGIC:
            assert {NEEDLE.fullmatch(line)[3] for line in lines} == set(example.answers)  # type: ignore[index]
        elif subset == "variable_tracking":
            assert [line.split()[1] for line in lines] == list(example.answers)
        else:
            assert not lines, "all of the document counts"
        assert all(line in example.context for line in lines)
        prompt = encode(TOKENIZERS[tokenizer], example, None)
        unused = example.meta["length"] - len(prompt.input_ids) - example.max_new_tokens
        assert 0 <= unused < 610, "another sentence, line or word would have fitted"


@pytest.mark.parametrize(
    ("subset", "wording"),
    [
        (
            "niah_single_3",
            "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
            "the uuid afterwards.\n{context}\nWhat is the special magic uuid for {query} mentioned in the provided "
            "text? The special magic uuid for {query} mentioned in the provided text is",
        ),
        (
            "niah_multiquery",
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} "
            "mentioned in the provided text? The special magic numbers for {query} mentioned in the provided text are",
        ),
        (
            "frequent_words",
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
            "text above, the three most frequently appeared words are:",
        ),
    ],
)
def test_the_wording_is_rulers(subset: str, wording: str) -> None:
    example = examples(subset, limit=1)[0]
    query = max(re.findall(r" for (.*?) mentioned in", example.suffix), default="", key=len)
    assert all(key in query for _, key, _ in NEEDLE.findall(example.context))
    assert example.prompt == wording.format(context=example.context, query=query)


def test_needles_stand_at_many_depths() -> None:
    starts = [
        example.evidence[0][0] / len(example.prompt) for example in examples(*MAGIC[:3], lengths=(6000,), limit=8)
    ]
    assert min(starts) < 0.3
    assert max(starts) > 0.7


def test_a_case_is_the_same_whatever_others_are_run() -> None:
    both = {(one.task, one.id): one for one in examples(lengths=(2500, 3000), limit=2)}
    for subset in SUBSETS:
        assert both[f"ruler/{subset}", "3000-0"] == examples(subset, lengths=(3000,), limit=1)[0]
    assert len({example.answers for example in both.values()}) == 4 * len(SUBSETS)
    assert examples(seed=1, limit=1)[0].answers != examples(seed=0, limit=1)[0].answers


def test_each_answer_that_is_found_counts_in_whatever_case() -> None:
    example = examples("variable_tracking", limit=1)[0]
    task = create_task("ruler")
    assert task.score(example, " ".join(example.answers))["score"] == 1
    assert task.score(example, f"they are {example.answers[3].lower()},{example.answers[1]}x")["score"] == 0.4
    assert task.score(example, "")["score"] == 0


def test_no_word_is_a_part_of_another() -> None:
    words = [*ADJECTIVES, *NOUNS, *VERBS]
    assert not [(one, other) for one in words for other in words if one is not other and one in other]


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_length_without_room_is_refused(subset: str) -> None:
    with pytest.raises(ConfigError, match="lengths=300 leaves no room"):
        examples(subset, lengths=(300,))


def test_a_haystack_that_is_missing_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt"):
        examples("niah_single_2", haystack=(tmp_path / "gone.txt",))
