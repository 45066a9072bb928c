"""The one place where a model's chat template is applied, and where it is seen that nothing was lost on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ModelError, PromptError, first_line
from compresskv.prompts.offsets import token_range

_STAND_IN = "\x1a"  # what no template contains


@dataclass(frozen=True)
class Message:
    """A user's message as the model reads it."""

    input_ids: list[int]
    offsets: Sequence[tuple[int, int]] | None
    """Characters of the rendered text that each token holds; None where the tokenizer cannot tell."""
    start: int
    """Where the message's own text begins in the rendered text."""
    text: str = ""
    """The rendered text."""

    def tokens_of(self, start: int, end: int) -> slice:
        """The tokens that hold these characters of the message's own text.

        Raises:
            ModelError: the tokenizer cannot tell.
        """
        if self.offsets is None:
            raise ModelError("this needs a fast tokenizer, one that knows where in the text each token stands")
        return token_range(self.offsets, self.start + start, self.start + end)

    def check_holds(self, name: str, start: int, end: int) -> None:
        """Refuse a prompt that lacks one of its parts.

        Args:
            name: what these characters of the message's own text are.
        Raises:
            PromptError: no token holds any of them.
        """
        if self.offsets is None:
            lost = not self.input_ids
        else:
            tokens = self.tokens_of(start, end)
            lost = tokens.start == tokens.stop
        if lost:
            raise PromptError(f"the tokenizer leaves nothing of the {name}: no token of the prompt holds any of it")


def encode_message(
    tokenizer: PreTrainedTokenizerBase, content: str, *, chat: bool = True, plain_end: str = ""
) -> Message:
    """A user's message in the model's chat template or, where there is none, as it is.

    Args:
        chat: False: as it is in any case.
        plain_end: what follows the content where there is no template.
    Raises:
        PromptError: as for `apply_chat_template`.
    """
    templated = chat and has_chat_template(tokenizer)
    text, start = apply_chat_template(tokenizer, content) if templated else (content + plain_end, 0)
    fast = bool(getattr(tokenizer, "is_fast", False))
    # A template writes its special tokens itself.
    encoded: Any = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=fast, verbose=False)
    return Message(encoded["input_ids"], encoded["offset_mapping"] if fast else None, start, text)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> list[int]:
    """A rendered text, or a part of one, as `encode_message` does.

    Args:
        begins: whether the prompt begins with it: a tokenizer's own special tokens stand there alone.
    """
    encoded: Any = tokenizer(text, add_special_tokens=begins and not has_chat_template(tokenizer), verbose=False)
    return list(encoded["input_ids"])


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model was made to read messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, content: str) -> tuple[str, int]:
    """The content as a user's message, in a template that takes it as text or as a list of parts.

    Returns: the rendered text, and where the content begins in it (or would, had the template not cut white space).

    Raises:
        PromptError: the template fails, does not write the content as it is, or there are several to choose from.
    """
    name = _template_name(tokenizer)
    problem = "it does not write the document and the question as they are"
    for in_parts in (False, True):
        try:
            text = _render(tokenizer, [("user", content)], name, in_parts)
            head, found, _ = _render(tokenizer, [("user", _STAND_IN)], name, in_parts).partition(_STAND_IN)
        except Exception as error:  # noqa: BLE001 - a template is a program of its own, which may raise anything
            problem = f"it fails ({first_line(error)})"
            continue
        start = _place(text, content, len(head))
        if found and start is not None:
            return text, start
    raise PromptError(f"the model's chat template cannot be used: {problem}")


def render_turn(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """What the template writes after an answer where the user goes on with `content`, up to where the next one begins.

    Raises:
        PromptError: the template takes no conversation, or does not write what the user says.
    """
    name = _template_name(tokenizer)
    problem = "it does not write what is said"
    for in_parts in (False, True):
        said = [("user", "?"), ("assistant", _STAND_IN), ("user", content)]
        try:
            _, found, after = _render(tokenizer, said, name, in_parts).partition(_STAND_IN)
        except Exception as error:  # noqa: BLE001 - as above
            problem = f"it fails ({first_line(error)})"
            continue
        if found and content.strip() in after:
            return after
    raise PromptError(f"the model's chat template cannot be used for a conversation: {problem}")


def _template_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Which of several named templates; None: the only one, or the default."""
    templates: Any = tokenizer.chat_template
    if isinstance(templates, str) or "default" in templates:
        return None
    if len(templates) == 1:
        return str(next(iter(templates)))
    names = ", ".join(sorted(templates))
    raise PromptError(f"the model has several chat templates ({names}) and none is the default one")


def _render(tokenizer: PreTrainedTokenizerBase, said: list[tuple[str, str]], name: str | None, in_parts: bool) -> str:
    messages: Any = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text} for role, text in said
    ]
    rendered = tokenizer.apply_chat_template(messages, chat_template=name, add_generation_prompt=True, tokenize=False)
    return str(rendered)


def _place(text: str, content: str, likely: int) -> int | None:
    """Where the content begins in the rendered text, at the likely place if it may; None where it is not there."""
    if text.startswith(content, likely):
        return likely
    written = content.strip()
    place = likely if text.startswith(written, likely) else text.find(written)
    return None if place < 0 else place - content.index(written)
