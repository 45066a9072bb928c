"""The masking ablation: does the model still find needles without the heads that a profile names?

If a profile is right, masking its best semantic retrieval heads costs most of the accuracy, and masking as many random
heads costs little (CompressKV, section 4.4; Wu et al., arXiv 2404.15574, section 3).
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.routing import routing
from compresskv.cache.full import FullCache
from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.calibration.measure import SUCCESS_RECALL
from compresskv.calibration.needles import (
    DEFAULT_NEEDLES,
    NeedleDocument,
    encode_questions,
    longest_question,
    read_needles,
    split_needles,
)
from compresskv.calibration.recall import rouge_1_recall
from compresskv.calibration.recording import MaskedLayer
from compresskv.errors import ConfigError
from compresskv.models.decoding import end_tokens, last_logits, prefill
from compresskv.models.place import input_device
from compresskv.models.shape import decoder_config
from compresskv.profiles.profile import Profile
from compresskv.prompts.prompt import context_length
from compresskv.system.check import check_least
from compresskv.system.progress import Progress

_ROWS = 32  # sets of masked heads that are run as one batch: decode reads the weights once for all of them

Head = tuple[int, int]
"""(layer of the model, query head)."""


@dataclass(frozen=True)
class Ablation:
    """Accuracy with some heads masked."""

    group: str
    """'none', 'semantic', 'traditional' or 'random'."""
    count: int
    """Heads masked."""
    successes: int
    cases: int

    @property
    def accuracy(self) -> float:
        """Share of the cases answered."""
        return self.successes / self.cases


@dataclass(frozen=True)
class VerifySettings:
    """What the ablation reads."""

    counts: tuple[int, ...] = (5, 10, 20, 30)
    """Heads to mask."""
    length: int = 1024
    """Prompt tokens."""
    num_documents: int = 6
    """Documents, each with a needle at every depth."""
    depths: tuple[float, ...] = (20, 40, 60, 80)
    """Where needles stand, in percent."""
    random_draws: int = 3
    """Sets of random heads, pooled."""
    seed: int = 0
    max_new_tokens: int = 48
    haystack: tuple[str, ...] = ()
    needles: str | None = None

    def __post_init__(self) -> None:
        """Validate what needs no model.

        Raises:
            ConfigError: naming the option and its value.
        """
        for option, value, least in (("length", self.length, 256), ("documents", self.num_documents, 1)):
            check_least(option, value, least)
        for count in self.counts or (0,):
            check_least("counts", count)


def verify_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    settings: VerifySettings | None = None,
    on_progress: Progress | None = None,
) -> list[Ablation]:
    """Mask heads and ask for needles, by default those held out when the profile was made.

    The document is read whole; heads are masked, at the attention's output, from the question on. A case counts as
    answered by the needle's words that the question does not hold: a model that can only echo the question fails.

    Returns: no head masked, then for each count the semantic, traditional and random heads; of the first two, those
        that the profile has scores of.
    Raises:
        ConfigError: fewer heads to mask than one or more than the model has, or a length above the model's context.
        DataError: the haystack is too short.
        ProfileError: the profile holds ranks within layers alone.
    """
    settings = settings or VerifySettings()
    limit = context_length(model)
    if limit is not None and settings.length > limit:
        problem = f"is above the model's context of {limit} tokens"
        raise ConfigError(problem, option="length", value=settings.length)
    groups = list(_groups(profile, settings))
    path = Path(settings.needles) if settings.needles else DEFAULT_NEEDLES
    _, needles = split_needles(read_needles(path))
    sentences = read_haystack([Path(path) for path in settings.haystack])
    haystack = Haystack(tokenizer, sentences)
    reserved = settings.max_new_tokens + longest_question(tokenizer, needles)
    successes = [0] * len(groups)
    cases = 0
    with routing(model):
        for i in range(settings.num_documents):
            # rotations far from those that calibration begins with: other text around the needles
            document = haystack.document(settings.length, 1000 + i, settings.depths, needles, reserved)
            for row in _answered(
                model, tokenizer, document, [heads for _, _, heads in groups], settings.max_new_tokens
            ):
                cases += 1
                successes = [total + right for total, right in zip(successes, row, strict=True)]
                if on_progress is not None:
                    on_progress("masking heads", cases / (settings.num_documents * len(document.needles)))
    return _pooled([(group, count) for group, count, _ in groups], successes, cases)


def _groups(profile: Profile, settings: VerifySettings) -> Iterator[tuple[str, int, list[Head]]]:
    semantic = profile.ranked_heads(profile.semantic_scores) if profile.num_runs else None
    traditional = None if profile.traditional_scores is None else profile.ranked_heads(profile.traditional_scores)
    heads = profile.best_heads
    if not settings.counts or not all(1 <= count <= len(heads) for count in settings.counts):
        problem = f"must lie between 1 and the model's {len(heads)} heads"
        raise ConfigError(problem, option="counts", value=settings.counts)
    draw = random.Random(settings.seed)
    yield "none", 0, []
    for count in settings.counts:
        if semantic is not None:
            yield "semantic", count, semantic[:count]
        if traditional is not None:
            yield "traditional", count, traditional[:count]
        for _ in range(settings.random_draws):
            yield "random", count, draw.sample(heads, count)


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: NeedleDocument,
    head_sets: Sequence[list[Head]],
    max_new_tokens: int,
) -> Iterator[list[bool]]:
    """For each question on the document, whether it was answered with each set of heads masked."""
    prefix, questions = encode_questions(tokenizer, document, document.questions)
    config = decoder_config(model)
    cache = FullCache(model, lambda layer_idx, _: MaskedLayer(layer_idx, config))
    prefill(model, torch.tensor([prefix], device=input_device(model)), cache)
    for (_, needle), question in zip(document.needles, questions, strict=True):
        answers: list[str] = []
        for start in range(0, len(head_sets), _ROWS):
            rows = head_sets[start : start + _ROWS]
            branch = cache.branch()
            branch.batch_repeat_interleave(len(rows))
            for layer in branch.routed:
                masked = [[head for layer_idx, head in heads if layer_idx == layer.layer_idx] for heads in rows]
                layer.mask_heads(masked, config.num_attention_heads)
            answers += _answers(model, tokenizer, question.suffix, branch, len(rows), max_new_tokens)
        yield [rouge_1_recall(answer, needle.news) > SUCCESS_RECALL for answer in answers]


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suffix: list[int],
    cache: FullCache,
    num_rows: int,
    max_new_tokens: int,
) -> list[str]:
    """Continue all rows greedily; each answer ends at its first end-of-text token."""
    ends = end_tokens(model, tokenizer)
    tokens = torch.tensor([suffix] * num_rows, device=input_device(model))
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    while len(rows[0]) < max_new_tokens and not all(ends.intersection(row) for row in rows):
        tokens = last_logits(model, tokens, cache).argmax(dim=-1, keepdim=True)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
    whole = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in whole]


def _pooled(labels: list[tuple[str, int]], successes: list[int], cases: int) -> list[Ablation]:
    pooled: dict[tuple[str, int], list[int]] = {}
    for label, right in zip(labels, successes, strict=True):
        total = pooled.setdefault(label, [0, 0])
        total[0] += right
        total[1] += cases
    return [Ablation(group, count, right, asked) for (group, count), (right, asked) in pooled.items()]


def to_rows(ablations: list[Ablation]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {
            "masked": one.group,
            "heads": one.count,
            "successes": one.successes,
            "cases": one.cases,
            "accuracy": one.accuracy,
        }
        for one in ablations
    ]
