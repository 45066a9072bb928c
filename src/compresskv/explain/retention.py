"""Which prompt tokens each layer keeps, beside their texts: the data behind `compresskv explain`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.answer import notes_of
from compresskv.cache.cache import CompressedCache
from compresskv.cache.candidates import CandidateStats
from compresskv.cache.layer import CompressedLayer
from compresskv.compression import Compressing
from compresskv.errors import ConfigError
from compresskv.explain.text import PromptText
from compresskv.methods.base import Method
from compresskv.models.decoding import decode, end_tokens
from compresskv.plans.capture import read_prompt
from compresskv.selection.auto_budget import AutoChoice
from compresskv.selection.budget_words import note_of
from compresskv.selection.budgets import Budget, read_budget
from compresskv.selection.cuts import Chunks, ChunkStats
from compresskv.selection.precision import NATIVE
from compresskv.selection.select import EMPTY_SLOT


@dataclass(frozen=True)
class LayerRetention:
    """What one full-attention layer keeps."""

    layer_idx: int
    """The layer's number in the model."""
    num_kv_heads: int
    counts: tuple[int, ...]
    """For each prompt token, how many of the KV heads keep it."""

    @property
    def num_retained(self) -> float:
        """Prompt tokens kept per KV head: a mean where KV heads differ."""
        return sum(self.counts) / self.num_kv_heads


@dataclass(frozen=True)
class Retention:
    """What every full-attention layer keeps of one prompt."""

    layers: tuple[LayerRetention, ...]

    @classmethod
    def of(cls, cache: CompressedCache) -> "Retention":
        """Read it from a cache after prefill; decoding does not change it.

        Raises:
            ValueError: nothing was read yet, or the cache holds a batch of several prompts.
        """
        return cls(tuple(_layer_retention(layer) for layer in cache.compressed_layers))

    def followed_by(self, num_tokens: int) -> "Retention":
        """With as many tokens behind it that are all kept: a question that came after what was chosen."""
        return Retention(
            tuple(replace(one, counts=one.counts + (one.num_kv_heads,) * num_tokens) for one in self.layers)
        )

    @property
    def num_tokens(self) -> int:
        """The prompt's length."""
        return len(self.layers[0].counts)

    @property
    def fraction(self) -> float:
        """Mean share of the prompt's tokens that is kept, over layers and KV heads."""
        return self.fraction_of([slice(0, self.num_tokens)])

    def fraction_of(self, spans: Sequence[slice]) -> float:
        """The same, of the tokens in `spans` only."""
        tokens = sorted({token for span in spans for token in range(span.start, span.stop)})
        kept = (sum(layer.counts[token] for token in tokens) / layer.num_kv_heads for layer in self.layers)
        return sum(kept) / (len(self.layers) * len(tokens))


@dataclass(frozen=True)
class Explanation:
    """What one method kept of a prompt, and what it answered from that."""

    method: str
    """Its name, with the options that differ from its defaults."""
    budget: int | float | str | list[int] | None
    """As it was asked for; None where the method evicts nothing, whatever is asked for."""
    retention: Retention
    kv_nbytes_full: int
    kv_nbytes: int
    answer: str | None
    """None where none was asked for."""
    cut_off: bool = False
    """Whether `max_new_tokens` ended it."""
    store: str = NATIVE
    """In how many bits a number it is held; see `compressing`."""
    auto: AutoChoice | None = None
    """How much was kept and why, where the budget is 'auto'."""
    chunks: ChunkStats | None = None
    candidates: CandidateStats | None = None
    budget_note: str | None = None
    """As in `GenerationStats`, as are what was held meanwhile."""
    attended: tuple[float, ...] | None = None
    """Of each prompt token, its mean share in the attention of the answer's tokens; None where that was not noted."""

    @property
    def notes(self) -> list[str]:
        """As those of `GenerationStats`."""
        return notes_of(self.budget_note, self.chunks, self.candidates)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [
            {"layer": layer.layer_idx, "num_kv_heads": layer.num_kv_heads, "retained": list(layer.counts)}
            for layer in self.retention.layers
        ]
        return {
            "method": self.method,
            "budget": self.budget,
            "store": self.store,
            "auto": None if self.auto is None else self.auto.to_dict(),
            "chunks": None if self.chunks is None else asdict(self.chunks),
            "candidates": None if self.candidates is None else asdict(self.candidates),
            "budget_note": self.budget_note,
            "retained_fraction": self.retention.fraction,
            "kv_nbytes_full": self.kv_nbytes_full,
            "kv_nbytes": self.kv_nbytes,
            "answer": self.answer,
            "cut_off": self.cut_off,
            "attended": None if self.attended is None else [round(share, 6) for share in self.attended],
            "layers": layers,
        }


@dataclass(frozen=True)
class Report:
    """One prompt, as one or several methods compressed it."""

    model: str
    document: str
    """Where the document came from."""
    question: str
    num_truncated: int
    """Document tokens cut out to make the prompt fit."""
    prompt: PromptText
    explanations: tuple[Explanation, ...]
    dtype: str
    """Of the weights; see `weights_dtype`."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "document": self.document,
            "question": self.question,
            "prompt_tokens": len(self.prompt.texts),
            "truncated_tokens": self.num_truncated,
            "prompt": self.prompt.to_dict(),
            "methods": [explanation.to_dict() for explanation in self.explanations],
        }


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    method: Method,
    budget: Budget,
    *,
    store: str = NATIVE,
    chunks: Chunks | None = None,
    candidates: int | None = defaults.CANDIDATES,
    max_new_tokens: int = 0,
    on_prefill: Callable[[int, int], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Explanation:
    """Read a prompt (1, T), note what each layer keeps, and answer where `max_new_tokens` is above 0.

    Args:
        store, candidates: as for `compressing`.
        chunks: how the prompt is cut while it is read; None: at its end alone.
        on_prefill: called with (layers done, layers) while the prompt is read.
        on_token: called with each token of the answer as it comes.
    Raises:
        ConfigError, ModelError: as for `compressing`; or the method looks ahead.
    """
    budget = read_budget(budget)
    if method.lookahead:
        raise ConfigError(f"lookahead={method.lookahead} cannot be explained: nothing is evicted before the answer")
    held: dict[str, Any] = {"store": store, "chunks": chunks, "candidates": candidates}
    with Compressing(model, method, budget, on_layer=on_prefill, **held) as cache:
        logits = read_prompt(model, input_ids[0].tolist(), cache)
        retention, kv_nbytes, full_nbytes = Retention.of(cache), cache.nbytes, cache.full_nbytes
        auto = next(iter(cache.auto_choices), None)
        answer, cut_off = None, False
        if max_new_tokens > 0:
            token_ids = decode(model, tokenizer, int(logits.argmax()), cache, max_new_tokens, on_token)
            cut_off = token_ids[-1] not in end_tokens(model, tokenizer)
            answer = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
    told, num_prompt = method.told_budget(budget), retention.num_tokens
    num_kept = retention.fraction * num_prompt
    note = note_of(told, num_kept, num_prompt, method.window_at(int(num_kept)))
    meanwhile = cache.chunk_stats, cache.candidate_stats, note
    return Explanation(method.label, told, retention, full_nbytes, kv_nbytes, answer, cut_off, store, auto, *meanwhile)


def _layer_retention(layer: CompressedLayer) -> LayerRetention:
    if layer.in_prefill or layer.keys is None or layer.store is None:
        raise ValueError("the cache has not read a whole prompt yet")
    batch_size, num_kv_heads = layer.keys.shape[:2]
    if batch_size != 1:
        raise ValueError(f"the cache holds {batch_size} prompts; a retention is of one")
    num_tokens = layer.num_prompt_tokens
    if layer.positions is None:
        return LayerRetention(layer.layer_idx, num_kv_heads, (num_kv_heads,) * num_tokens)
    kept = layer.store.positions.expand(1, num_kv_heads, -1)
    counts = kept[(kept != EMPTY_SLOT) & (kept < num_tokens)].bincount(minlength=num_tokens)
    return LayerRetention(layer.layer_idx, num_kv_heads, tuple(counts.tolist()))
