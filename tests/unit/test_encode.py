"""Examples as token ids: the model reads its own chat template, and evidence and question are where they are said."""

import functools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import planted
from compresskv.errors import PromptError
from compresskv.evaluation.encode import EncodedPrompt, encode
from compresskv.evaluation.tasks.example import Example

TEMPLATES = {
    "around": "<begin>{% for m in messages %}[user] {{ m['content'] }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
    "system prompt": "<begin>[system] You are ünhelpful. {% raw %}{{ content }}{% endraw %} {}%s\\n[user]"
    "{{ messages[0]['content'] }}[assistant]",
    "nothing before": "{{ messages[0]['content'] }}\n[assistant]",
    "nothing after": "<begin>[user] {{ messages[0]['content'] }}",
    "nothing but the text": "{{ messages[0]['content'] }}",
}


@functools.cache
def tokenizer(template: str | None = "around", special: bool = False) -> PreTrainedTokenizerBase:
    """Byte-level pairs. `special`: with a start token before each text, as Llama's tokenizer has."""
    made: Any = planted.bytes_tokenizer(None if template is None else TEMPLATES[template])
    if special:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", made.bos_token_id)]
        )
        assert made("water")["input_ids"][0] == made.bos_token_id
    return made


def example(context: str, evidence: str = "", prefix: str = "Read this.\n", suffix: str = "\n\nWhat of it?") -> Example:
    """`evidence` stands in the prompt once."""
    prompt = prefix + context + suffix
    assert not evidence or prompt.count(evidence) == 1
    start = prompt.index(evidence)
    spans = ((start, start + len(evidence)),) if evidence else ()
    return Example("needle/single", "1", prefix, context, suffix, ("it",), 8, evidence=spans)


def decoded(tokens: list[int], using: PreTrainedTokenizerBase) -> str:
    return str(using.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def templated(text: str, using: PreTrainedTokenizerBase) -> list[int]:
    """What transformers makes of a message."""
    message = [{"role": "user", "content": text}]
    return list(using.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


class TestTemplate:
    @pytest.mark.parametrize("special", [False, True])
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_the_ids_are_those_of_the_models_own_template_without_a_second_start_token(
        self, template: str, special: bool
    ) -> None:
        own = tokenizer(template, special)
        case = example("water stone field. \x1a 🦜 {{ messages }} <end><begin> [assistant]\n%s {} naïve")
        assert encode(own, case, None).input_ids == templated(case.prompt, own)

    @pytest.mark.parametrize("special", [False, True])
    @pytest.mark.parametrize("template", [None, *TEMPLATES])
    def test_a_prompt_that_is_no_chat_is_the_plain_text_with_the_tokenizers_own_start(
        self, template: str | None, special: bool
    ) -> None:
        own = tokenizer(template, special)
        case = replace(example("water stone field."), chat=False)
        prompt = encode(own, case, None)
        assert prompt.input_ids == own(case.prompt)["input_ids"]
        assert (prompt.input_ids[0] == own.bos_token_id) == special

    def test_a_model_without_a_template_reads_a_chat_as_plain_text(self) -> None:
        own = tokenizer(None, special=True)
        assert encode(own, example("water."), None).input_ids == own(example("water.").prompt)["input_ids"]

    def test_prompts_that_differ_in_one_token_have_hashes_that_differ(self) -> None:
        texts = ["water stone", "water stones", "water  stone"]
        hashes = {encode(tokenizer(), example(text), None).sha256 for text in texts}
        assert len(hashes) == 3
        assert all(len(one) == 16 for one in hashes)
        assert encode(tokenizer(), example("water stone"), None).sha256 in hashes


class TestEvidence:
    CONTEXT = " water 🦜🦜 stone. The naïve key is 四十二 parrots. More water under the hill."

    @pytest.mark.parametrize("template", [None, *TEMPLATES])
    @pytest.mark.parametrize(
        "evidence",
        [
            " The naïve key is 四十二 parrots.",
            " 🦜🦜",
            "🦜 ",
            "四",
            "ïve key",
            "Read",
            "it?",
            " water 🦜",
            "e hill.",
            "\n\nWh",
        ],
    )
    def test_its_tokens_are_those_that_spell_it_and_no_more(self, evidence: str, template: str | None) -> None:
        """The template's own words may run into the prompt's first and last token."""
        own = tokenizer(template)
        case = example(self.CONTEXT, evidence)
        prompt = encode(own, case, None)
        (span,) = prompt.evidence
        assert evidence in decoded(prompt.input_ids[span], own)
        assert evidence not in decoded(prompt.input_ids[span.start + 1 : span.stop], own)
        assert evidence not in decoded(prompt.input_ids[span.start : span.stop - 1], own)

    def test_where_tokens_end_with_it_they_decode_to_exactly_it(self) -> None:
        case = example(self.CONTEXT, " The naïve key is 四十二 parrots.")
        prompt = encode(tokenizer(), case, None)
        assert decoded(prompt.input_ids[prompt.evidence[0]], tokenizer()) == " The naïve key is 四十二 parrots."

    def test_a_start_token_is_not_evidence(self) -> None:
        own = tokenizer(None, special=True)
        prompt = encode(own, example(self.CONTEXT, "Read"), None)
        assert decoded(prompt.input_ids[prompt.evidence[0]], own) == "Read"

    def test_several_pieces_stay_in_order(self) -> None:
        case = example(self.CONTEXT)
        places = [(case.prompt.index(word), case.prompt.index(word) + len(word)) for word in (" More", " stone")]
        prompt = encode(tokenizer(), replace(case, evidence=tuple(places)), None)
        assert [decoded(prompt.input_ids[span], tokenizer()) for span in prompt.evidence] == [" More", " stone"]


class TestSuffix:
    @pytest.mark.parametrize("template", [None, *TEMPLATES])
    @pytest.mark.parametrize("suffix", ["\n\nWhat of it?", " What?", "?", "🦜", " "])
    def test_it_starts_where_the_document_ends(self, template: str | None, suffix: str) -> None:
        own = tokenizer(template)
        case = example(" water stone.", suffix=suffix)
        prompt = encode(own, case, None)
        before, after = (
            decoded(part, own)
            for part in (prompt.input_ids[: prompt.suffix_start], prompt.input_ids[prompt.suffix_start :])
        )
        assert before.endswith("stone.")
        assert after.startswith(suffix)

    def test_a_token_of_document_and_question_is_the_questions(self) -> None:
        """What a method compresses must hold nothing of the question."""
        case = example(" wat", suffix="er?")
        assert len(tokenizer()(" water")["input_ids"]) == 1
        prompt = encode(tokenizer(), case, None)
        assert decoded(prompt.input_ids[prompt.suffix_start :], tokenizer()).startswith(" water?")

    def test_without_one_what_the_template_puts_after_the_document_takes_its_place(self) -> None:
        prompt = encode(tokenizer(), example(" water stone.", suffix=""), None)
        assert decoded(prompt.input_ids[prompt.suffix_start :], tokenizer()) == " [end]\n[assistant]\n"

    def test_without_one_and_without_a_template_it_is_the_prompts_end(self) -> None:
        prompt = encode(tokenizer(None), example(" water stone.", suffix=""), None)
        assert prompt.suffix_start == len(prompt.input_ids)


WORDS = [" water", " stone", " field", " garden", " tree", " morning", " between"]
"""One token each, wherever they stand."""


def numbered_words(count: int) -> str:
    return "".join(WORDS[number * number % len(WORDS)] for number in range(count))


class TestCut:
    @given(num_words=st.integers(4, 60), max_tokens=st.integers(2, 80))
    @settings(max_examples=60, deadline=None)
    def test_as_many_tokens_of_both_ends_are_kept_as_longbench_keeps(self, num_words: int, max_tokens: int) -> None:
        own = tokenizer(None)
        case = replace(example(numbered_words(num_words), prefix="", suffix=""), chat=False)
        ids = own(case.prompt)["input_ids"]
        assert len(ids) == num_words
        half = max_tokens // 2  # LongBench's pred.py
        expected = ids[:half] + ids[-half:] if num_words > max_tokens else ids
        prompt = encode(own, case, max_tokens)
        assert prompt.input_ids == expected
        assert prompt.num_truncated == num_words - len(expected)

    @given(num_words=st.integers(4, 60), spare=st.integers(2, 70))
    @settings(max_examples=60, deadline=None)
    def test_the_template_is_never_cut(self, num_words: int, spare: int) -> None:
        own = tokenizer("around")
        case = example(numbered_words(num_words), prefix="", suffix="")
        frame = len(templated(case.prompt, own)) - num_words
        prompt = encode(own, case, frame + spare)
        half = spare // 2
        ids = own(case.prompt)["input_ids"]
        expected = templated(decoded(ids[:half] + ids[-half:] if num_words > spare else ids, own), own)
        assert prompt.input_ids == expected

    @given(
        context=st.lists(st.sampled_from([*"ab 1\nï四🦜", " water"]), min_size=1, max_size=60).map("".join),
        max_tokens=st.integers(8, 90),
        template=st.sampled_from([None, "around", "nothing before"]),
        data=st.data(),
    )
    @settings(max_examples=150, deadline=None)
    def test_whatever_the_text_it_fits_and_only_its_middle_is_missing(
        self, context: str, max_tokens: int, template: str | None, data: st.DataObject
    ) -> None:
        own = tokenizer(template)
        case = example(context)
        start = data.draw(st.integers(0, len(case.prompt) - 1))
        end = data.draw(st.integers(start + 1, len(case.prompt)))
        case = replace(case, evidence=((start, end),))
        try:
            prompt = encode(own, case, max_tokens)
        except PromptError:
            assert max_tokens < 60  # one that has room for the template and a few characters
            return
        whole = encode(own, case, None)
        assert len(prompt.input_ids) <= max_tokens
        assert prompt.num_truncated == len(whole.input_ids) - len(prompt.input_ids)
        head, tail = decoded(whole.input_ids, own).split(case.prompt)
        text = decoded(prompt.input_ids, own)
        assert text.startswith(head)
        assert text.endswith(tail)
        kept = text[len(head) : len(text) - len(tail)]
        assert common_prefix(kept, case.prompt) + common_prefix(kept[::-1], case.prompt[::-1]) >= len(kept)
        self.check_places(prompt, case, kept, own)

    def check_places(self, prompt: EncodedPrompt, case: Example, kept: str, own: PreTrainedTokenizerBase) -> None:
        """The question is where the text says, and no place lies outside of it."""
        assert 0 <= prompt.suffix_start <= len(prompt.input_ids)
        after = decoded(prompt.input_ids[prompt.suffix_start :], own)
        if kept.endswith(case.suffix):
            assert case.suffix.strip() in after
        for span in prompt.evidence:
            assert 0 <= span.start < span.stop <= len(prompt.input_ids)

    def marked(self, place: int) -> Example:
        """120 words of which the one at `place` is evidence."""
        words = [" water"] * 120
        words[place] = " morning"
        return example("".join(words), " morning")

    @pytest.mark.parametrize(("place", "kept"), [(0, True), (20, True), (60, False), (100, True), (119, True)])
    def test_evidence_moves_with_the_text_and_goes_with_it(self, place: int, kept: bool) -> None:
        prompt = encode(tokenizer(), self.marked(place), 110)
        assert [decoded(prompt.input_ids[span], tokenizer()) for span in prompt.evidence] == [" morning"] * kept
        assert (" morning" in decoded(prompt.input_ids, tokenizer())) == kept

    def test_of_evidence_that_is_cut_in_two_the_rest_stays(self) -> None:
        case = example(numbered_words(120), numbered_words(120)[:-5])
        prompt = encode(tokenizer(), case, 110)
        (span,) = prompt.evidence
        text = decoded(prompt.input_ids[span], tokenizer())
        assert text.startswith(numbered_words(20))
        assert text.endswith(numbered_words(120)[-100:])  # its last letters share a token with what follows
        assert 40 < span.stop - span.start < 100

    def test_the_question_is_found_after_a_cut(self) -> None:
        prompt = encode(tokenizer(), self.marked(60), 80)
        assert decoded(prompt.input_ids[prompt.suffix_start :], tokenizer()).startswith("\n\nWhat of it? [end]")

    def test_a_question_that_is_cut_itself_starts_at_the_seam(self) -> None:
        own = tokenizer(None)
        case = replace(example(" water" * 10, prefix="", suffix=" stone" * 90), chat=False)
        prompt = encode(own, case, 60)
        assert decoded(prompt.input_ids, own) == " water" * 10 + " stone" * 50
        assert prompt.suffix_start == 10

    @pytest.mark.parametrize("max_tokens", [1, 2, 5])
    def test_a_limit_below_the_template_is_refused_and_not_tried_for_ever(self, max_tokens: int) -> None:
        with pytest.raises(PromptError, match=f"no room for a prompt in {max_tokens} tokens") as caught:
            encode(tokenizer(), self.marked(60), max_tokens)
        assert "\n" not in str(caught.value)


def common_prefix(one: str, other: str) -> int:
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
