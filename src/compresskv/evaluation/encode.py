"""An example becomes token ids, with the places of its evidence and its question."""

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.evaluation.example import Example

_STAND_IN = "\x1a"  # what no template contains


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    input_ids: list[int]
    num_truncated: int
    """Tokens cut out of the middle."""
    evidence: tuple[slice, ...]
    """Token ranges that hold the answer; what was cut away is not among them."""
    suffix_start: int
    """The first token that is not part of the document: where a query-agnostic method stops reading and compresses."""

    @property
    def sha256(self) -> str:
        """16 hex digits that stand for the token ids."""
        return hashlib.sha256(repr(self.input_ids).encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_tokens: int | None) -> EncodedPrompt:
    """Put the prompt into the chat template, and cut its middle out where it is longer than `max_tokens`.

    The cut is LongBench's (arXiv 2308.14508): of the prompt without the template, as many tokens of its beginning as
    of its end are kept.
    """
    head, tail = _template(tokenizer) if example.chat else ("", "")
    spans = [*example.evidence, (len(example.prefix) + len(example.context), len(example.prompt))]
    text, cut = example.prompt, 0
    encoded = _tokens(tokenizer, head + text + tail, special=not head)
    while max_tokens is not None and len(encoded["input_ids"]) > max_tokens:
        # Tokens at the seam can merge into more than there were, so one cut is not always enough.
        cut += len(encoded["input_ids"]) - max_tokens
        text, spans = _without_middle(tokenizer, example, cut)
        encoded = _tokens(tokenizer, head + text + tail, special=not head)
    *evidence, (start, end) = [(a + len(head), b + len(head)) for a, b in spans]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    ranges = (_token_range(offsets, *span) for span in evidence if span[0] < span[1])
    suffix = _token_range(offsets, start, end).start if start < end else len(offsets)
    return EncodedPrompt(encoded["input_ids"], cut, tuple(ranges), min(suffix, _token_range(offsets, end, end).start))


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after a user's text; two empty strings where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    message = [{"role": "user", "content": _STAND_IN}]
    text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    head, _, tail = text.partition(_STAND_IN)
    return head, tail


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> Any:
    return tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)


def _without_middle(
    tokenizer: PreTrainedTokenizerBase, example: Example, num_cut: int
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt without `num_cut` tokens of its middle, and where its evidence and suffix are then."""
    offsets: list[tuple[int, int]] = _tokens(tokenizer, example.prompt, special=False)["offset_mapping"]
    half = max(1, (len(offsets) - num_cut) // 2)
    gap_start, gap_end = offsets[half - 1][1], offsets[-half][0]

    def moved(place: int) -> int:
        return min(place, gap_start) if place < gap_end else place - (gap_end - gap_start)

    spans = [*example.evidence, (len(example.prefix) + len(example.context), len(example.prompt))]
    text = example.prompt[:gap_start] + example.prompt[gap_end:]
    return text, [(moved(start), moved(end)) for start, end in spans]


def _token_range(offsets: list[tuple[int, int]], start: int, end: int) -> slice:
    """The tokens that hold any of the characters from `start` to `end`."""
    first = sum(1 for _, token_end in offsets if token_end <= start)
    return slice(first, max(first, sum(1 for token_start, _ in offsets if token_start < end)))
