"""Records: one JSONL row for each case and configuration."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """What one configuration did on one example. `None` where a figure was not measured or has no meaning."""

    task: str
    """'needle/single', 'longbench/hotpotqa', ..."""
    example: str
    """The example's id: unique within the task."""
    method: str
    """A method's name or, for settings of one's own, its label ('snapkv[window_size=32]'), or 'kvpress:SnapKVPress'."""
    budget: int | float | None
    """As asked for: a count of tokens or a fraction; None for the full cache."""
    setting: str
    """'aware': the question was in the prompt when tokens were chosen; 'agnostic': it came after."""
    prompt_sha256: str
    """First 16 hex digits of the hash of the prompt's token ids."""
    prompt_tokens: int
    truncated_tokens: int
    retained_tokens: float
    """Prompt tokens kept, mean over layers and KV heads."""
    kv_nbytes: int
    """Bytes really held after eviction."""
    kv_nbytes_full: int
    prediction: str | None = None
    """None where no answer was generated."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Task metrics in 0..1, with 'score'; empty where there is no prediction."""
    evidence_recall: float | None = None
    """Share of the evidence tokens retained, mean over layers and KV heads."""
    kl_divergence: float | None = None
    """Nats per token from the full cache's distribution, over the full cache's own answer, teacher-forced."""
    top1_agreement: float | None = None
    """Share of those tokens at which the arg-max equals the full cache's."""
    prefill_s: float | None = None
    """Of the prefill that this configuration used; shared by all configurations of the example where `shared`."""
    shared_prefill: bool = True
    select_s: float | None = None
    """Scoring, selecting and gathering."""
    decode_s: float | None = None
    generated_tokens: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """The example's: length, depth, ..."""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    """compresskv, torch, transformers, python, and the model's name and dtype."""

    @property
    def config(self) -> str:
        """What tables call it: 'full', 'snapkv @ 128'."""
        name = self.method if self.budget is None else f"{self.method} @ {self.budget:g}"
        return name if self.setting == "aware" else f"{name} (agnostic)"

    @property
    def retained_fraction(self) -> float:
        """Mean share of the prompt's tokens that was kept."""
        return self.retained_tokens / self.prompt_tokens
