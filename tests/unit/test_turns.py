"""A prompt that is read in parts has the tokens of the whole one, whatever a tokenizer joins across the seam."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compresskv import PromptError
from compresskv.prompts.prompt import build_prompt
from compresskv.prompts.turns import first_part, next_part, question_tokens, turn_tokens

DOCUMENT = 'The cook, Tom Finch, signed it.\nNobody else did, in 1871 or later; "no-one" at all...\n\nHe said so.'
QUESTIONS = ["Who signed it?", "\n\nwho?", "1871?", "?", "- a list\n- of things", "“Quoted”", "éa", "  ", "中文"]
CHAT = (
    "<s>[{% for one in messages %}{{ one['role'] }}] {{ one['content'] | trim }}<e>\n[{% endfor %}"
    "{% if add_generation_prompt %}assistant] {% endif %}"
)


def byte_level(pattern: str, template: str | None) -> PreTrainedTokenizerBase:
    """BPE over bytes, trained so that full stops join line breaks where the pattern lets them."""
    built = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "<e>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    built.train_from_iterator([f"{DOCUMENT}\n\n{question}" for question in QUESTIONS * 40], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, eos_token="<e>", bos_token="<s>")


PATTERNS = {
    "joins stops and breaks": r" ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "joins whole lines": r"[^\n]+\n*|\n+",
}


@pytest.fixture(params=[*PATTERNS], scope="module")
def pattern(request: pytest.FixtureRequest) -> str:
    return PATTERNS[request.param]


@pytest.fixture(params=[CHAT, None], ids=["chat", "plain"], scope="module")
def tokenizer(request: pytest.FixtureRequest, pattern: str) -> PreTrainedTokenizerBase:
    return byte_level(pattern, request.param)


@pytest.mark.parametrize("copies", [1, 30])
def test_document_and_question_have_the_tokens_of_the_whole_prompt(
    tokenizer: PreTrainedTokenizerBase, copies: int
) -> None:
    document = "\n".join([DOCUMENT] * copies)
    part = first_part(tokenizer, document)
    assert copies == 1 or len(part.ending.token_ids) <= 66 < len(part.input_ids)
    for question in QUESTIONS:
        if not question.strip():
            with pytest.raises(PromptError, match="the question is empty"):
                question_tokens(tokenizer, part.ending, question)
            continue
        whole = build_prompt(tokenizer, document, question).input_ids[0].tolist()
        assert part.input_ids + question_tokens(tokenizer, part.ending, question) == whole


def test_what_is_appended_has_the_tokens_of_one_document(tokenizer: PreTrainedTokenizerBase) -> None:
    first = first_part(tokenizer, DOCUMENT)
    second = next_part(tokenizer, first.ending, f"  More. {DOCUMENT}")
    whole = build_prompt(tokenizer, f"{DOCUMENT}\n\nMore. {DOCUMENT}", "Who?").input_ids[0].tolist()
    rest = question_tokens(tokenizer, second.ending, "Who?")
    assert first.input_ids + second.input_ids + rest == whole


def test_most_of_a_document_is_read_before_the_question(tokenizer: PreTrainedTokenizerBase) -> None:
    part = first_part(tokenizer, DOCUMENT)
    assert len(tokenizer.decode(part.input_ids)) >= len(DOCUMENT) - len(" He said so.")
    assert tokenizer.decode(part.input_ids) in tokenizer.apply_chat_template(
        [{"role": "user", "content": DOCUMENT}], chat_template=CHAT, tokenize=False
    )


def test_a_conversation_has_the_tokens_that_the_template_writes() -> None:
    tokenizer = byte_level(PATTERNS["gpt2"], CHAT)
    ends = {tokenizer.eos_token_id}
    answer = tokenizer("Tom did.", add_special_tokens=False)["input_ids"]
    turn = turn_tokens(tokenizer, [*answer, *ends], ends, " And who else? ")
    assert tokenizer.decode(turn) == "<e>\n[user] And who else?<e>\n[assistant] "
    cut = turn_tokens(tokenizer, answer, ends, "And who else?")
    assert cut == [answer[-1], *turn]
    plain = byte_level(PATTERNS["gpt2"], None)
    assert plain.decode(turn_tokens(plain, [*answer, *ends], ends, "Who?")) == "\n\nWho?\n"
    with pytest.raises(PromptError, match="the question is empty"):
        turn_tokens(plain, answer, ends, " ")


def test_a_template_without_conversations_says_so() -> None:
    once = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHAT
    tokenizer = byte_level(PATTERNS["gpt2"], once)
    part = first_part(tokenizer, DOCUMENT)
    assert question_tokens(tokenizer, part.ending, "Who?")
    with pytest.raises(PromptError, match=r"cannot be used for a conversation: it fails .*one message only"):
        turn_tokens(tokenizer, [5], set(), "Who?")
