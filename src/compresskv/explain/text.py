"""A prompt's tokens as text, and where its parts lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.prompts.offsets import offsets_of, token_range

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
_LONGEST_GROUP = 12  # tokens; keeps text that really holds replacement characters from growing one endless group


@dataclass(frozen=True)
class PromptText:
    """A prompt's tokens as text, and where its parts lie. Ranges are token positions."""

    texts: tuple[str, ...]
    """One for each token; together the whole prompt. A character made of several tokens stands at the first of them,
    and the others are empty."""
    special: tuple[bool, ...]
    """The tokenizer's special tokens."""
    document: slice
    question: slice
    evidence: tuple[slice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "texts": list(self.texts),
            "special": [position for position, special in enumerate(self.special) if special],
            "document": _pair(self.document),
            "question": _pair(self.question),
            "evidence": [_pair(span) for span in self.evidence],
        }


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    context: str,
    question: str,
    evidence: Sequence[str] = (),
) -> PromptText:
    """The texts of a prompt's tokens, and the places of its document, its question and every `evidence`.

    Evidence is sought in the document only, and white space makes no difference. What was cut out of a document is not
    found, and parts of the prompt that the tokenizer does not give back as they were count as document.
    """
    texts = token_texts(tokenizer, input_ids)
    whole = "".join(texts)
    beginning, asked = occurrences(whole, context.strip()[:40]), occurrences(whole, question)
    start = beginning[0][0] if beginning else 0
    end, asked_end = asked[-1] if asked and asked[-1][0] > start else (len(whole), len(whole))
    found = [span for text in evidence for span in occurrences(whole[start:end], text)]
    offsets = offsets_of(texts)
    special_ids = set(tokenizer.all_special_ids)
    return PromptText(
        texts,
        tuple(token in special_ids for token in input_ids),
        document=token_range(offsets, start, end),
        question=token_range(offsets, end, asked_end),
        evidence=tuple(token_range(offsets, start + a, start + b) for a, b in sorted(set(found))),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> tuple[str, ...]:
    """One text a token, as `PromptText.texts`."""
    texts: list[str] = []
    before: list[int] = []  # tokenizers decode a token differently at a text's beginning
    group: list[int] = []
    for token in input_ids:
        group.append(token)
        text = _decode(tokenizer, before + group)[len(_decode(tokenizer, before)) :]
        if not text.endswith(_REPLACEMENT) or len(group) == _LONGEST_GROUP:
            texts += [text] + [""] * (len(group) - 1)
            before, group = group, []
    if group:
        text = _decode(tokenizer, before + group)[len(_decode(tokenizer, before)) :]
        texts += [text] + [""] * (len(group) - 1)
    return tuple(texts)


def occurrences(text: str, wanted: str) -> list[tuple[int, int]]:
    """(start, end) of every place in `text` that holds `wanted`, whatever the white space."""
    characters = "".join(wanted.split())
    pattern = r"\s*".join(map(re.escape, characters))
    return [match.span() for match in re.finditer(pattern, text)] if characters else []


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    if not token_ids:
        return ""
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _pair(span: slice) -> list[int]:
    return [span.start, span.stop]
