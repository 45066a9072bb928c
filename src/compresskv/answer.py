"""An answer, and what it cost."""

from dataclasses import asdict, dataclass
from typing import Any

from compresskv.cache.candidates import CandidateStats
from compresskv.plans.plan import Plan
from compresskv.selection.auto_budget import AutoChoice
from compresskv.selection.cuts import ChunkStats, DecodeStats


@dataclass(frozen=True)
class GenerationStats:
    """What one answer cost. Seconds end in `_s`, bytes are `nbytes`."""

    method: str
    """Its name, with the options that differ from its defaults."""
    budget: int | float | str | list[int] | None
    """As it was asked for; None where the method evicts nothing, whatever is asked for."""
    store: str
    """In how many bits a number what is kept is held; see `compressing`."""
    prompt_tokens: int
    truncated_tokens: int
    """Document tokens cut out to make the prompt fit."""
    generated_tokens: int
    cut_off: bool
    """Whether `max_new_tokens` ended the answer, or whoever was told of its tokens, and not the model."""
    retained_per_layer: list[float]
    """Prompt tokens kept per KV head in each full-attention layer: a mean where KV heads differ."""
    kv_nbytes_full: int
    """KV bytes of the whole prompt, before eviction."""
    kv_nbytes: int
    """KV bytes really held right after eviction, of storages, not of views; at the answer's end if that came first."""
    prefill_s: float
    time_to_first_token_s: float
    """Prefill, eviction, and choosing the first token."""
    decode_s: float
    """From the first token to the last, without `compile_s`."""
    compiled_tokens: int
    """How many tokens were read by a compiled step."""
    compile_s: float
    """Building the compiled step, or loading it."""
    not_compiled: str | None
    """Why tokens were not read by a compiled step, where that was asked for."""
    peak_memory_nbytes: int
    """The most since the process began (on a GPU what its allocator held), or since whoever calls reset that count."""
    dtype: str
    """Of the weights: 'bfloat16', 'float16', 'float32' or 'int8'; 'float32 (torchao)' where others quantised them."""
    auto: AutoChoice | None = None
    """How much was kept and why, where the budget is 'auto'."""
    chunks: ChunkStats | None = None
    """How the prompt was cut while it was read, where that was asked for."""
    decode: DecodeStats | None = None
    """How the answer was cut, where that was asked for."""
    candidates: CandidateStats | None = None
    """How much layers held that waited for later ones, where that was not all, or was not to be."""
    budget_note: str | None = None
    """What the budget came to, where that may not be what was meant."""

    @property
    def notes(self) -> list[str]:
        """What was asked for and made no difference, was not done as it was asked for, or may not be what was meant."""
        return notes_of(self.budget_note, self.chunks, self.decode, self.candidates)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None where the answer has one token."""
        return (self.generated_tokens - 1) / self.decode_s if self.generated_tokens > 1 else None

    @property
    def retained_fraction(self) -> float:
        """Mean share of the prompt's tokens that was kept."""
        return sum(self.retained_per_layer) / (len(self.retained_per_layer) * self.prompt_tokens)


@dataclass(frozen=True)
class Generation:
    """An answer."""

    answer: str
    token_ids: list[int]
    """Generated tokens, the end-of-text token included where it came."""
    stats: GenerationStats
    plan: Plan | None = None
    """What was kept, where the prompt was read twice."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answer": self.answer,
            "token_ids": self.token_ids,
            "stats": {
                **asdict(self.stats),
                "decode_tokens_per_s": self.stats.decode_tokens_per_s,
                "retained_fraction": self.stats.retained_fraction,
            },
        }


def notes_of(budget_note: str | None, *told: ChunkStats | DecodeStats | CandidateStats | None) -> list[str]:
    """The notes that there are: of the budget, and of what was held meanwhile."""
    notes = [budget_note, *(one.note for one in told if one is not None)]
    return [note for note in notes if note is not None]
