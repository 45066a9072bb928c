"""Prompts with a real byte-level tokenizer, built here: one token a byte, so that every count can be done by hand."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compresskv.errors import ConfigError, PromptError
from compresskv.prompts.prompt import build_prompt, context_length, room_for_prompt

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
BEFORE, AFTER = "<s>user: ", "</s><s>assistant: "
NUM_TEMPLATE = len("user: ") + len("assistant: ") + 3  # each of <s>, </s>, <s> is one token


@functools.cache
def byte_tokenizer(chat_template: str | None = None, clean_up: bool = False) -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 256), ("</s>", 257)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=clean_up
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerBase:
    """Whole words w0 to w99; decoding puts spaces between them, as sentence-piece tokenizers do."""
    vocab = {f"w{index}": index for index in range(100)} | {"[UNK]": 100}
    backend = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=False
    )
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> str:
    """The prompt as the model reads it, special tokens included."""
    ids = build_prompt(tokenizer, *args, **kwargs).input_ids
    return str(tokenizer.decode(ids[0], skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TestWhole:
    def test_without_a_chat_template(self) -> None:
        assert text_of(byte_tokenizer(), "A document.", "A question?") == "<s>A document.\n\nA question?\n"

    def test_with_a_chat_template(self) -> None:
        """The template writes its own first token: the tokenizer must not add a second."""
        expected = f"{BEFORE}A document.\n\nA question?{AFTER}"
        assert text_of(byte_tokenizer(CHAT), "A document.", "A question?") == expected

    def test_white_space_around_both_is_dropped_and_kept_inside(self) -> None:
        text = text_of(byte_tokenizer(), "\n\n a  b\n\nc \n", "\t why \n")
        assert text == "<s>a  b\n\nc\n\nwhy\n"

    def test_shape_and_type(self) -> None:
        prompt = build_prompt(byte_tokenizer(), "abc", "d")
        assert prompt.input_ids.shape == (1, len("<abc\n\nd\n"))
        assert str(prompt.input_ids.dtype) == "torch.int64"
        assert prompt.num_truncated == 0

    @pytest.mark.parametrize("truncate", ["never", "middle"])
    @pytest.mark.parametrize("max_tokens", [None, 8, 9])
    def test_what_fits_is_left_whole(self, max_tokens: int | None, truncate: str) -> None:
        prompt = build_prompt(byte_tokenizer(), "abc", "d", max_tokens=max_tokens, truncate=truncate)
        assert (prompt.input_ids.shape[1], prompt.num_truncated) == (8, 0)


class TestErrors:
    @pytest.mark.parametrize("empty", ["", " ", "\n\t ", "\u3000"])
    def test_empty(self, empty: str) -> None:
        with pytest.raises(PromptError, match=r"^the document is empty$"):
            build_prompt(byte_tokenizer(), empty, "why?")
        with pytest.raises(PromptError, match=r"^the question is empty$"):
            build_prompt(byte_tokenizer(), "text", empty)

    def test_bytes_that_are_no_text(self) -> None:
        """Python puts what it cannot decode of a command line or a file name into strings as lone surrogates."""
        broken = b"caf\xe9".decode("utf-8", "surrogateescape")
        with pytest.raises(PromptError, match=r"^the document is not valid text"):
            build_prompt(byte_tokenizer(), broken, "why?")
        with pytest.raises(PromptError, match=r"^the question is not valid text"):
            build_prompt(byte_tokenizer(), "text", broken)

    @pytest.mark.parametrize("truncate", ["", "left", "Middle", None])
    def test_an_unknown_truncation(self, truncate: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"truncate=.* is unknown: (choose from never, middle|did you mean 'middle'\?)$"
        ) as caught:
            build_prompt(byte_tokenizer(), "text", "why?", truncate=truncate)
        assert f"truncate={truncate!r}" in str(caught.value)

    def test_never_names_both_numbers(self) -> None:
        with pytest.raises(PromptError, match=r"prompt has 58 tokens.* for 57 .*truncate='middle'") as caught:
            build_prompt(byte_tokenizer(), "x" * 50, "why?", max_tokens=57)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("max_tokens", [1, 9, 49])
    def test_a_question_that_does_not_fit(self, max_tokens: int) -> None:
        message = rf"question alone needs 50 tokens, but only {max_tokens} fit"
        with pytest.raises(PromptError, match=message):
            build_prompt(byte_tokenizer(), "x" * 500, "y" * 44, max_tokens=max_tokens, truncate="middle")

    def test_the_number_needed_is_enough(self) -> None:
        text = text_of(byte_tokenizer(), "a" + "x" * 500 + "b", "y" * 44, max_tokens=50, truncate="middle")
        assert text == f"<s>ab\n\n{'y' * 44}\n"


class TestMiddle:
    @pytest.mark.parametrize("chat_template", [None, CHAT])
    @pytest.mark.parametrize("max_tokens", range(60, 70))
    def test_keeps_both_ends_and_the_question(self, chat_template: str | None, max_tokens: int) -> None:
        document = "".join(chr(ord("a") + index % 26) if index % 7 else " " for index in range(1, 401))
        question = "What is it?"
        tokenizer = byte_tokenizer(chat_template)
        num_other = len(question) + 2 + (2 if chat_template is None else NUM_TEMPLATE)
        before, after = ("<s>", "\n") if chat_template is None else (BEFORE, AFTER)
        half = (max_tokens - num_other) // 2

        prompt = build_prompt(tokenizer, document, question, max_tokens=max_tokens, truncate="middle")
        text = str(tokenizer.decode(prompt.input_ids[0], clean_up_tokenization_spaces=False))
        assert text == f"{before}{document[:half]}{document[-half:]}\n\n{question}{after}"
        assert prompt.input_ids.shape[1] == num_other + 2 * half
        assert prompt.num_truncated == len(document) - 2 * half

    @settings(deadline=None, max_examples=60)
    @given(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.integers(1, 250),
        st.sampled_from([None, CHAT]),
    )
    def test_any_text_fits_or_is_refused(
        self, document: str, question: str, max_tokens: int, chat_template: str | None
    ) -> None:
        """A cut through a character leaves up to 6 tokens more, which are then cut as well."""
        tokenizer = byte_tokenizer(chat_template)
        if not document.strip() or not question.strip():
            return
        num_other = build_prompt(tokenizer, "x", question).input_ids.shape[1] - 1
        try:
            prompt = build_prompt(tokenizer, document, question, max_tokens=max_tokens, truncate="middle")
        except PromptError:
            assert max_tokens < num_other + 2 + 12
            return
        num_tokens = prompt.input_ids.shape[1]
        assert num_tokens <= max_tokens
        text = str(tokenizer.decode(prompt.input_ids[0], clean_up_tokenization_spaces=False))
        assert text.endswith(f"\n\n{question.strip()}{AFTER if chat_template else chr(10)}")
        if prompt.num_truncated:
            assert num_tokens > max_tokens - 16
            assert text.removeprefix(BEFORE if chat_template else "<s>")[0] in (document.strip()[0], "\ufffd")
        else:
            assert document.strip() in text

    def test_the_kept_text_is_not_tidied(self) -> None:
        """Some tokenizers drop spaces before punctuation where they decode: the model must read what was written."""
        document = "f (x) , g (y) . " * 40 + "the end ."
        tokenizer = byte_tokenizer(clean_up=True)
        text = text_of(tokenizer, document, "Why?", max_tokens=100, truncate="middle")
        assert text.startswith("<s>f (x) , g (y) . f (x) ,")
        assert text.endswith(" , g (y) . the end .\n\nWhy?\n")

    def test_a_tokenizer_that_decodes_words(self) -> None:
        """The two words at the cut may grow together; all others stay."""
        words = [f"w{index}" for index in range(100)]
        prompt = build_prompt(word_tokenizer(), " ".join(words), "w7 w7 w7", max_tokens=23, truncate="middle")
        ids = prompt.input_ids[0].tolist()
        assert 21 <= len(ids) <= 23
        assert ids[:9] == list(range(9))
        assert ids[-12:-3] == list(range(91, 100))
        assert ids[-3:] == [7, 7, 7]


def model_with(config: PretrainedConfig) -> Any:
    return SimpleNamespace(config=config)


class TestRoom:
    def test_context_length(self) -> None:
        assert context_length(model_with(LlamaConfig(max_position_embeddings=128))) == 128
        assert context_length(model_with(PretrainedConfig())) is None

    @pytest.mark.parametrize(("max_new_tokens", "room"), [(1, 127), (28, 100), (127, 1)])
    def test_room(self, max_new_tokens: int, room: int) -> None:
        assert room_for_prompt(model_with(LlamaConfig(max_position_embeddings=128)), max_new_tokens) == room

    def test_a_model_without_a_limit_has_any_room(self) -> None:
        assert room_for_prompt(model_with(PretrainedConfig()), 10**6) is None

    @pytest.mark.parametrize("max_new_tokens", [0, -1])
    @pytest.mark.parametrize("config", [LlamaConfig(), PretrainedConfig()])
    def test_no_new_tokens(self, max_new_tokens: int, config: PretrainedConfig) -> None:
        with pytest.raises(ConfigError, match=f"max_new_tokens={max_new_tokens} must be at least 1"):
            room_for_prompt(model_with(config), max_new_tokens)

    @pytest.mark.parametrize("max_new_tokens", [128, 129, 10**9])
    def test_an_answer_that_fills_the_context(self, max_new_tokens: int) -> None:
        with pytest.raises(ConfigError, match=f"max_new_tokens={max_new_tokens} .*context of 128 tokens"):
            room_for_prompt(model_with(LlamaConfig(max_position_embeddings=128)), max_new_tokens)
