"""An example becomes token ids, with the places of its evidence and its question."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.errors import PromptError
from compresskv.evaluation.tasks.example import Example
from compresskv.plans.plan import prompt_digest
from compresskv.prompts.template import encode_message


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    input_ids: list[int]
    num_truncated: int
    """Tokens cut out of the middle: what the whole prompt has more than this."""
    evidence: tuple[slice, ...]
    """Token ranges that hold the answer; what was cut away is not among them."""
    suffix_start: int
    """The first token that is not part of the document: where a query-agnostic method stops reading and compresses."""

    @property
    def document(self) -> list[int]:
        """The tokens before `suffix_start`."""
        return self.input_ids[: self.suffix_start]

    @property
    def sha256(self) -> str:
        """16 hex digits that stand for the token ids."""
        return prompt_digest(self.input_ids)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_tokens: int | None) -> EncodedPrompt:
    """Put the prompt into the chat template, and cut its middle out where it is longer than `max_tokens`.

    The cut is LongBench's (arXiv 2308.14508): of the prompt without the template, as many tokens of its beginning as
    of its end are kept.

    Raises:
        PromptError: not even two tokens of the prompt fit, or the chat template loses some of it.
    """
    text, spans = example.prompt, _spans(example)
    message = encode_message(tokenizer, text, chat=example.chat)
    num_tokens, cut = len(message.input_ids), 0
    while max_tokens is not None and len(message.input_ids) > max_tokens:
        # Tokens at the seam can merge into more than there were, so one cut is not always enough.
        cut += len(message.input_ids) - max_tokens
        shorter = _without_middle(tokenizer, example, cut)
        if shorter is None:
            raise PromptError(f"{example.task} {example.id}: no room for a prompt in {max_tokens} tokens")
        text, spans = shorter
        message = encode_message(tokenizer, text, chat=example.chat)
    *evidence, (start, end) = spans
    if text[:start].strip():
        message.check_holds("document", 0, start)
    if text[start:end].strip():
        message.check_holds("question", start, end)
    ranges = (message.tokens_of(*span) for span in evidence if span[0] < span[1])
    suffix = message.tokens_of(start, end).start if start < end else len(message.input_ids)
    return EncodedPrompt(
        input_ids=message.input_ids,
        num_truncated=num_tokens - len(message.input_ids),
        evidence=tuple(ranges),
        suffix_start=min(suffix, message.tokens_of(end, end).start),
    )


def _spans(example: Example) -> list[tuple[int, int]]:
    """Characters of the evidence and, last, of the suffix."""
    return [*example.evidence, (len(example.prefix) + len(example.context), len(example.prompt))]


def _without_middle(
    tokenizer: PreTrainedTokenizerBase, example: Example, num_cut: int
) -> tuple[str, list[tuple[int, int]]] | None:
    """The prompt without `num_cut` tokens of its middle, and where its evidence and suffix are then.

    None where fewer than two tokens are left.
    """
    encoded: Any = tokenizer(example.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    half = (len(offsets) - num_cut) // 2
    if half < 1:
        return None
    # both ends can be pieces of one character
    gap_start, gap_end = offsets[half - 1][1], max(offsets[half - 1][1], offsets[-half][0])

    def moved(place: int) -> int:
        return min(place, gap_start) if place < gap_end else place - (gap_end - gap_start)

    text = example.prompt[:gap_start] + example.prompt[gap_end:]
    return text, [(moved(start), moved(end)) for start, end in _spans(example)]
