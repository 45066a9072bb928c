"""A document and a question become the token ids that a model reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.errors import ConfigError, PromptError
from compresskv.models.shape import decoder_config
from compresskv.prompts.request import check_request
from compresskv.prompts.template import encode_message
from compresskv.system.check import check_least, is_int


@dataclass(frozen=True)
class Prompt:
    """The prompt as the model reads it."""

    input_ids: Tensor
    """(1, T) int64."""
    num_truncated: int
    """Document tokens that were cut out to make it fit."""


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    *,
    max_tokens: int | None = None,
    truncate: str = "never",
) -> Prompt:
    """The document, an empty line and the question, in the model's chat template where it has one.

    Args:
        max_tokens: the longest prompt that leaves room for the answer; None: any length.
        truncate: 'never', or 'middle': where the prompt is too long, cut tokens out of the document's middle, as
            LongBench (arXiv 2308.14508) does. The question is never cut.
    Raises:
        ConfigError: an unknown `truncate`.
        PromptError: an empty document or question, one that is not text, a chat template that loses either, or a
            prompt that does not fit (both numbers are named).
    """
    check_request(context, question, truncate)
    input_ids = _encode(tokenizer, context, question)
    num_tokens = input_ids.shape[1]
    if max_tokens is None or num_tokens <= max_tokens:
        return Prompt(input_ids, 0)
    if truncate == "never":
        raise PromptError(
            f"the prompt has {num_tokens} tokens, but the model's context leaves room for {max_tokens} before the "
            "answer: shorten the document or cut its middle with truncate='middle'"
        )
    return _cut_middle(tokenizer, context, question, max_tokens)


def context_length(model: PreTrainedModel) -> int | None:
    """The number of positions the model was made for; None where its config does not say."""
    length = getattr(decoder_config(model), "max_position_embeddings", None)
    return length if length is None or length > 0 else None  # XLNet's says -1


def room_for_prompt(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves `max_new_tokens` of the model's context for the answer.

    Raises:
        ConfigError: max_new_tokens is below 1 or fills the context.
    """
    if not is_int(max_new_tokens):
        raise ConfigError("must be an int", option="max_new_tokens", value=max_new_tokens)
    check_least("max_new_tokens", max_new_tokens)
    length = context_length(model)
    if length is not None and max_new_tokens >= length:
        problem = f"leaves no room in the model's context of {length} tokens"
        raise ConfigError(problem, option="max_new_tokens", value=max_new_tokens)
    return None if length is None else length - max_new_tokens


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> Tensor:
    document, asked = context.strip(), question.strip()
    content = f"{document}\n\n{asked}"
    message = encode_message(tokenizer, content, plain_end="\n")
    message.check_holds("document", 0, len(document))
    message.check_holds("question", len(content) - len(asked), len(content))
    return torch.tensor([message.input_ids], dtype=torch.long)


def _cut_middle(tokenizer: PreTrainedTokenizerBase, context: str, question: str, max_tokens: int) -> Prompt:
    """Keep as many tokens of the document's two ends as fit; text is cut, so token counts can shift by a few."""
    document = tokenizer(context.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    num_kept = len(document)
    excess = _encode(tokenizer, context, question).shape[1] - max_tokens
    while excess > 0:
        num_kept -= excess
        if num_kept < 2:
            needed = max_tokens - num_kept + 2
            raise PromptError(f"the question alone needs {needed} tokens, but only {max_tokens} fit before the answer")
        half = num_kept // 2
        ends = [
            str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for part in (document[:half], document[-half:])
        ]
        input_ids = _encode(tokenizer, "".join(ends), question)
        excess = input_ids.shape[1] - max_tokens
    return Prompt(input_ids, len(document) - 2 * half)
