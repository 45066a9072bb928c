"""A prompt that is read in parts: the document before its questions are known, and what each turn adds to it.

What was read is never tokenised again. A part's tokens are those that the whole rendered prompt has behind what was
read, so that a model sees what `build_prompt` would have given it; for that, the document is read only as far as its
last tokens are the same whatever is asked. What is behind (often its last full stop, which many tokenizers join with
the line break that follows) is read with each question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.errors import PromptError
from compresskv.prompts.request import check_request
from compresskv.prompts.template import encode_message, encode_rendered, has_chat_template, render_turn

_PROBES = ("What", "a", "1", "(x)", "“é", "\tif", "Ω")
"""Questions that begin in different ways: the tokens before them that all have in common depend on none."""
_NUM_CONTEXT = 64
"""Tokens before a part that are tokenised with it: tokenizers look no further back."""


@dataclass(frozen=True)
class Ending:
    """The end of what was read, which later parts are tokenised behind."""

    text: str
    """The rendered text's last characters, with those that are still to be read."""
    token_ids: tuple[int, ...]
    """How that text begins in tokens: these were read."""
    unread: str
    """The characters behind those tokens."""

    def is_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether this tokenizer makes the same tokens of the text."""
        num_read = len(self.token_ids)
        return tuple(encode_rendered(tokenizer, self.text + _asked(tokenizer, _PROBES[0]))[:num_read]) == self.token_ids

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """The tokens that follow what was read, of the unread characters and `text`."""
        token_ids = encode_rendered(tokenizer, self.text + text)
        if tuple(token_ids[: len(self.token_ids)]) == self.token_ids:
            return token_ids[len(self.token_ids) :]
        return encode_rendered(tokenizer, self.unread + text, begins=False)


@dataclass(frozen=True)
class PromptPart:
    """What is read next, and how it ends."""

    input_ids: list[int]
    ending: Ending


def first_part(tokenizer: PreTrainedTokenizerBase, document: str) -> PromptPart:
    """The document as it begins every prompt about it, in the chat template where there is one.

    Raises:
        PromptError: as for `build_prompt`.
    """
    check_request(document, _PROBES[0], "never")
    document = document.strip()
    message = encode_message(tokenizer, f"{document}\n\n{_PROBES[0]}", plain_end="\n")
    message.check_holds("document", 0, len(document))
    return _part(tokenizer, None, message.text[: message.start + len(document)])


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Where documents begin in rendered prompts."""
    return encode_message(tokenizer, f"x\n\n{_PROBES[0]}", plain_end="\n").start


def next_part(tokenizer: PreTrainedTokenizerBase, ending: Ending, document: str) -> PromptPart:
    """More of the document, after an empty line.

    Raises:
        PromptError: it is empty, or no text.
    """
    check_request(document, _PROBES[0], "never", document_is="text")
    return _part(tokenizer, ending, f"\n\n{document.strip()}")


def question_tokens(tokenizer: PreTrainedTokenizerBase, ending: Ending, question: str) -> list[int]:
    """What a question adds to the document: the rest of the prompt, up to where the answer begins.

    Raises:
        PromptError: it is empty or no text, or the chat template loses it.
    """
    check_request(_PROBES[0], question, "never")
    return ending.tokens_of(tokenizer, _asked(tokenizer, question.strip()))


def turn_tokens(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], ends: set[int], question: str) -> list[int]:
    """What follows an answer that was generated, up to where the next one begins.

    Args:
        answer: its tokens, of which all but the last were read.
        ends: tokens that end an answer; the template writes its own.
    Raises:
        PromptError: as for `question_tokens`, or the template takes no conversation.
    """
    check_request(_PROBES[0], question, "never")
    asked = question.strip()
    text = render_turn(tokenizer, asked) if has_chat_template(tokenizer) else f"\n\n{asked}\n"
    unread = [] if answer[-1] in ends else [answer[-1]]
    return unread + encode_rendered(tokenizer, text, begins=False)


def _asked(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What is rendered behind a document."""
    message = encode_message(tokenizer, f"x\n\n{question}", plain_end="\n")
    return message.text[message.start + 1 :]


def _part(tokenizer: PreTrainedTokenizerBase, ending: Ending | None, text: str) -> PromptPart:
    """The tokens of `text`, behind what was read, that no question changes."""
    before = "" if ending is None else ending.text
    num_read = 0 if ending is None else len(ending.token_ids)
    asked = ["", *(_asked(tokenizer, probe) for probe in _PROBES)]
    whole = [encode_rendered(tokenizer, before + text + more) for more in asked]
    if ending is not None and any(tuple(one[:num_read]) != ending.token_ids for one in whole):
        before, num_read = ending.unread, 0  # as `Ending.tokens_of` has it
        whole = [encode_rendered(tokenizer, before + text + more, begins=False) for more in asked]
    stable = _num_common(whole)
    if stable <= num_read:
        raise PromptError("the tokenizer leaves nothing of the document that does not depend on the question")
    return PromptPart(whole[0][num_read:stable], _ending(tokenizer, before + text, whole, stable, asked))


def _ending(
    tokenizer: PreTrainedTokenizerBase, text: str, whole: list[list[int]], stable: int, asked: list[str]
) -> Ending:
    """The shortest end of `text` behind which every question is tokenised as behind all of it."""
    starts = _starts(tokenizer, text, stable)
    unread = "" if starts is None else text[starts[stable] :] if stable < len(starts) else ""
    if starts is not None and stable > _NUM_CONTEXT:
        end = text[starts[stable - _NUM_CONTEXT] :].lstrip()
        short = [encode_rendered(tokenizer, end + more) for more in asked]
        num_common = _num_common(short)
        begins = [len(one) - (len(all_of_it) - stable) for one, all_of_it in zip(short, whole, strict=True)]
        same = all(
            0 < begin <= num_common and one[begin:] == all_of_it[stable:]
            for begin, one, all_of_it in zip(begins, short, whole, strict=True)
        )
        if same and len(set(begins)) == 1:
            return Ending(end, tuple(short[0][: begins[0]]), unread)
    return Ending(text, tuple(whole[0][:stable]), unread)


def _starts(tokenizer: PreTrainedTokenizerBase, text: str, at_least: int) -> list[int] | None:
    """Where each token of the text begins; None where the tokenizer cannot tell."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded: Any = tokenizer(
        text, add_special_tokens=not has_chat_template(tokenizer), return_offsets_mapping=True, verbose=False
    )
    starts = [start for start, _ in encoded["offset_mapping"]]
    return starts if len(starts) >= at_least else None


def _num_common(lists: list[list[int]]) -> int:
    """How many tokens all begin with."""
    columns = zip(*lists, strict=False)
    return next((number for number, column in enumerate(columns) if len(set(column)) > 1), min(map(len, lists)))
