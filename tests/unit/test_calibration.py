"""Where needles are hidden, what is asked about them, and which tokens they are."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import planted
from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.calibration.needles import (
    SUMMARY,
    Needle,
    encode_questions,
    encode_request,
    longest_question,
    read_needles,
    split_needles,
)
from compresskv.errors import ConfigError, DataError, ModelError, ProfileError
from compresskv.prompts.prompt import build_prompt

TEMPLATE = "{% for message in messages %}<begin>user: {{ message['content'] | trim }}<end>\nassistant: {% endfor %}"
TOKENIZERS = {
    "words": planted.tokenizer(),
    "bytes": planted.bytes_tokenizer(),
    "bytes with a template": planted.bytes_tokenizer(TEMPLATE),
}
NEEDLES = [
    Needle("one", "place", "The spare key lies under the third flower pot from the left.", "Where is the spare key?"),
    Needle("two", "number", "Each boat carries 14 lamps, and one that is never lit.", "How many lamps has each boat?"),
    Needle("three", "reason", "They left at dawn because the bridge would not hold.", "Why did they leave at dawn?"),
    *(Needle(topic, "planted", planted.needle(topic), f"What of {topic}?") for topic in planted.TOPICS[:2]),
]
DEPTHS = (10.0, 50.0, 90.0)
ENDS = (0.0, 50.0, 100.0)  # nothing stands before the first needle, only the question behind the last
ANSWER = 48


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]


@pytest.fixture
def haystack(tokenizer: PreTrainedTokenizerBase) -> Haystack:
    return Haystack(tokenizer, planted.haystack_sentences())


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


class TestNeedles:
    def test_the_projects_own_are_many_and_of_many_kinds(self) -> None:
        needles = read_needles()
        assert len(needles) >= 12
        assert len({needle.kind for needle in needles}) >= 4
        assert all(needle.needle.endswith(".") and needle.question.endswith("?") for needle in needles)
        assert len({needle.question for needle in needles}) == len(needles)

    def test_no_needle_is_in_the_default_haystack(self) -> None:
        text = " ".join(read_haystack())
        assert not [needle.id for needle in read_needles() if needle.needle in text]

    def test_what_a_question_does_not_give_away(self) -> None:
        assert NEEDLES[0].news == "lies under third flower pot from left"
        assert all(len(needle.news.split()) >= 3 for needle in read_needles())

    def test_the_held_out_are_others_than_those_to_calibrate_with(self) -> None:
        needles = read_needles()
        calibrate, verify = split_needles(needles)
        assert sorted(needle.id for needle in [*calibrate, *verify]) == sorted(needle.id for needle in needles)
        assert len(verify) >= 4
        assert len(calibrate) > len(verify)

    def test_few_needles_serve_both(self) -> None:
        assert split_needles(NEEDLES) == (NEEDLES, NEEDLES)

    def test_a_users_file(self, tmp_path: Path) -> None:
        path = tmp_path / "needles.json"
        row = {"id": "key", "kind": "place", "needle": " The key is here. ", "question": "Where is it? ", "by": "me"}
        path.write_text(json.dumps({"needles": [row], "note": "ignored"}), encoding="utf-8")
        assert read_needles(path) == [Needle("key", "place", "The key is here.", "Where is it?")]

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            b"\xff\xfe\x00",
            "[]",
            "3",
            "{}",
            '{"needles": []}',
            '{"needles": 4}',
            '{"needles": ["a"]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": "c"}]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": "c", "question": 5}]}',
            '{"needles": [{"id": ["a"], "kind": "b", "needle": "c", "question": "d"}]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": " ", "question": "d"}]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": "c", "question": ""}]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": "It is so.", "question": "Is it so?"}]}',
            '{"needles": [{"id": "a", "kind": "b", "needle": "c", "question": "d"}'
            ', {"id": "a", "kind": "b", "needle": "e", "question": "f"}]}',
        ],
    )
    def test_what_is_no_list_of_needles_is_told_in_one_line(self, tmp_path: Path, content: str | bytes) -> None:
        path = tmp_path / "needles.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ProfileError, match=re.escape(str(path))) as caught:
            read_needles(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["missing.json", "."])
    def test_a_missing_file_and_a_folder_are_told(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ProfileError, match="needles="):
            read_needles(tmp_path / name)


class TestHaystackText:
    def test_the_default_is_one_text_whatever_python_runs_and_long_enough_for_a_long_context(self) -> None:
        sentences = read_haystack()
        assert sum(len(sentence.split()) for sentence in sentences) > 40_000
        assert hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16] == "a4e6feaf30a5dbe6"

    def test_files_and_folders_of_text_in_a_fixed_order(self, tmp_path: Path) -> None:
        (tmp_path / "notes" / "more").mkdir(parents=True)
        (tmp_path / "notes" / "b.txt").write_text("Second. Third!  Is it\nfourth?", encoding="utf-8")
        (tmp_path / "notes" / "a.txt").write_text("First", encoding="utf-8")
        (tmp_path / "notes" / "more" / "c.txt").write_text("Fifth\n\nsixth", encoding="utf-8")
        (tmp_path / "notes" / "picture.png").write_bytes(b"\xff\x00")
        (tmp_path / "last.md").write_text("Last.", encoding="utf-8")
        expected = ["First", "Second.", "Third!", "Is it fourth?", "Fifth", "sixth", "Last."]
        assert read_haystack([tmp_path / "notes", tmp_path / "last.md"]) == expected

    @pytest.mark.parametrize("text", ["word " * 2000, "字" * 5000], ids=["spaces", "none"])
    def test_text_without_ends_of_sentences_is_cut_by_length_and_nothing_is_lost(
        self, tmp_path: Path, text: str
    ) -> None:
        (tmp_path / "code.txt").write_text(f"Before. {text}", encoding="utf-8")
        sentences = read_haystack([tmp_path / "code.txt"])
        assert sentences[0] == "Before."
        assert max(map(len, sentences)) < 1000
        assert "".join(sentences[1:]).replace(" ", "") == text.replace(" ", "")

    @pytest.mark.parametrize("name", ["missing.txt", "binary.txt", "empty.txt", "folder"])
    def test_what_holds_no_text_is_told_by_name(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "binary.txt").write_bytes(b"\x80\x81\x82")
        (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
        (tmp_path / "folder").mkdir()
        with pytest.raises(DataError, match=f"^haystack=.*{name}") as caught:
            read_haystack([tmp_path / name])
        assert "\n" not in str(caught.value)


class TestDocuments:
    @pytest.mark.parametrize("length", [256, 700, 1500])
    def test_prompt_and_answer_are_almost_as_long_as_asked_and_never_longer(
        self, tokenizer: PreTrainedTokenizerBase, haystack: Haystack, length: int
    ) -> None:
        reserved = ANSWER + longest_question(tokenizer, NEEDLES)
        for rotation in range(25):
            document = haystack.document(length, rotation, DEPTHS, NEEDLES, reserved)
            prompts = [len(encode_request(tokenizer, document.text, q).input_ids) for q, _ in document.questions]
            assert length - 60 < max(prompts) + ANSWER <= length

    def test_a_sentence_longer_than_the_document_does_not_make_it_longer(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Help topics hold tables of hundreds of tokens without an end of a sentence."""
        sentences = planted.haystack_sentences()
        table = " ".join(sentences[:60]).replace(".", "")
        haystack = Haystack(tokenizer, [text for sentence in sentences for text in (table, sentence)])
        reserved = ANSWER + longest_question(tokenizer, NEEDLES)
        for rotation in range(10):
            document = haystack.document(400, rotation, DEPTHS, NEEDLES, reserved)
            prompts = [len(encode_request(tokenizer, document.text, q).input_ids) for q, _ in document.questions]
            assert 340 < max(prompts) + ANSWER <= 400

    def test_each_needle_stands_at_its_depth_within_a_sentence(
        self, tokenizer: PreTrainedTokenizerBase, haystack: Haystack
    ) -> None:
        depths = (0.0, 33.0, 50.0, 100.0)
        document = haystack.document(1200, 3, depths, NEEDLES)
        text, total = document.text, count(tokenizer, without_needles(document.text))
        longest = max(count(tokenizer, f" {sentence}") for sentence in planted.haystack_sentences())
        assert [depth for depth, _ in document.needles] == list(depths)
        for depth, needle in document.needles:
            before = count(tokenizer, without_needles(text[: text.index(needle.needle)]))
            assert depth / 100 * total - longest <= before <= depth / 100 * total + 1

    def test_needles_do_not_break_sentences(self, haystack: Haystack) -> None:
        document = haystack.document(600, 1, DEPTHS, NEEDLES)
        sentences = set(planted.haystack_sentences()) | {needle.needle for needle in NEEDLES}
        assert set(re.split(r"(?<=\.) ", document.text)) <= sentences

    @pytest.mark.parametrize(("num_needles", "depths"), [(5, DEPTHS), (3, DEPTHS), (2, (0.0, 20.0, 40.0, 60.0, 80.0))])
    def test_each_needle_stands_at_each_depth_once_over_all_rotations(
        self, num_needles: int, depths: tuple[float, ...]
    ) -> None:
        haystack = Haystack(planted.tokenizer(), planted.haystack_sentences())
        needles = NEEDLES[:num_needles]
        seen = [
            (needle.id, depth)
            for rotation in range(max(num_needles, len(depths)))
            for depth, needle in haystack.document(500, rotation, depths, needles).needles
        ]
        assert sorted(seen) == sorted(itertools.product([needle.id for needle in needles], depths))

    def test_a_document_names_no_needle_twice(self, haystack: Haystack) -> None:
        for rotation in range(7):
            document = haystack.document(500, rotation, DEPTHS, NEEDLES)
            assert len({needle.id for _, needle in document.needles}) == len(DEPTHS)
            assert all(document.text.count(needle.needle) == 1 for _, needle in document.needles)

    def test_rotations_differ_in_text_and_the_same_one_is_the_same(self, haystack: Haystack) -> None:
        documents = [haystack.document(500, rotation, DEPTHS, NEEDLES) for rotation in range(5)]
        assert len({without_needles(document.text) for document in documents}) == 5
        assert len({document.name for document in documents}) == 5
        assert haystack.document(500, 2, DEPTHS, NEEDLES) == documents[2]

    def test_a_short_haystack_is_refused_with_both_numbers(self) -> None:
        haystack = Haystack(planted.tokenizer(), planted.haystack_sentences(20))
        with pytest.raises(DataError, match=rf"{haystack.num_tokens} tokens.*1024") as caught:
            haystack.document(1024, 0, DEPTHS, NEEDLES)
        assert "\n" not in str(caught.value)

    def test_a_length_without_room_for_text_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        haystack = Haystack(tokenizer, planted.haystack_sentences())
        with pytest.raises(ConfigError, match="256 tokens leaves no room"):
            haystack.document(256, 0, DEPTHS, NEEDLES, reserved=230)


class TestQuestions:
    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[str, str]], list[int], list[Any]]:
        document = Haystack(tokenizer, planted.haystack_sentences()).document(500, 4, ENDS, NEEDLES)
        questions = [*document.questions, (SUMMARY, "")]
        return document.text, questions, *encode_questions(tokenizer, document, questions)

    def test_prefix_and_suffix_are_the_plainly_encoded_prompt(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text, questions, prefix, encoded = self.encode(tokenizer)
        assert len(encoded) == len(questions) == 4
        for (question, _), one in zip(questions, encoded, strict=True):
            prompt = build_prompt(tokenizer, text, question).input_ids[0].tolist()
            assert prefix + one.suffix == prompt  # what `ask` gives the model

    def test_the_prefix_holds_almost_all_of_the_document(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text, _, prefix, encoded = self.encode(tokenizer)
        assert len(prefix) >= count(tokenizer, text) - 32
        # An observation window fits into each question's own pass.
        assert min(len(one.suffix) for one in encoded) >= 32

    def test_the_questions_themselves_are_not_shared(self, tokenizer: PreTrainedTokenizerBase) -> None:
        _, questions, prefix, _ = self.encode(tokenizer)
        assert not [question for question, _ in questions if question in tokenizer.decode(prefix)]

    def test_a_span_covers_the_needles_tokens_and_no_others(self, tokenizer: PreTrainedTokenizerBase) -> None:
        _, questions, prefix, encoded = self.encode(tokenizer)
        for (_, needle), one in zip(questions[:-1], encoded[:-1], strict=True):
            tokens = (prefix + one.suffix)[one.span]
            if tokenizer is TOKENIZERS["words"]:
                assert tokens == tokenizer(needle, add_special_tokens=False)["input_ids"]
            else:
                assert tokenizer.decode(tokens).strip() == needle

    def test_a_question_about_the_whole_text_has_an_empty_span(self, tokenizer: PreTrainedTokenizerBase) -> None:
        _, _, _, encoded = self.encode(tokenizer)
        assert encoded[-1].span == slice(0, 0)

    def test_one_question_alone_leaves_a_window_to_its_own_pass(self, tokenizer: PreTrainedTokenizerBase) -> None:
        document = Haystack(tokenizer, planted.haystack_sentences()).document(500, 4, DEPTHS, NEEDLES)
        prefix, (only,) = encode_questions(tokenizer, document, document.questions[:1])
        assert len(only.suffix) == 32
        assert len(prefix) > 300

    def test_a_tokenizer_that_knows_no_offsets_is_refused(self) -> None:
        class Slow:
            is_fast = False

            def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
                return {"input_ids": list(text.encode())}

        slow: Any = Slow()
        document = Haystack(planted.tokenizer(), planted.haystack_sentences()).document(500, 0, DEPTHS, NEEDLES)
        with pytest.raises(ModelError, match="fast tokenizer"):
            encode_questions(slow, document, document.questions)


def without_needles(text: str) -> str:
    for needle in NEEDLES:
        text = text.replace(needle.needle, "")
    return " ".join(text.split())
