"""Records: one JSONL row for each case and configuration, in a folder of their run."""

from typing import Annotated, Any

import msgspec

from compresskv.selection.precision import NATIVE
from compresskv.system.convert import convert

SETTINGS = ("aware", "agnostic")
"""Whether tokens are chosen with the question in the prompt, or before it comes."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one configuration did on one example. `None` where a figure was not measured or has no meaning."""

    task: str
    """'needle/single', 'longbench/hotpotqa', ..."""
    example: str
    """The example's id: unique within the task."""
    method: str
    """A method's name or, for settings of one's own, its label ('snapkv[window_size=32]'), or 'kvpress:SnapKVPress'."""
    budget: int | float | Annotated[str, msgspec.Meta(pattern="B$|bytes$|^auto")] | None
    """As asked for: a count of tokens, a fraction, bytes or 'auto[...]'; None for the full cache."""
    setting: str
    """'aware': the question was in the prompt when tokens were chosen; 'agnostic': it came after."""
    prompt_sha256: str
    """First 16 hex digits of the hash of the prompt's token ids."""
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    truncated_tokens: int
    retained_tokens: float
    """Prompt tokens kept, mean over layers and KV heads."""
    kv_nbytes: int
    """Bytes really held after eviction."""
    kv_nbytes_full: int
    prediction: str | None = None
    """None where no answer was generated."""
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    """Task metrics in 0..1, with 'score'; empty where there is no prediction."""
    evidence_recall: float | None = None
    """Share of the evidence tokens retained, mean over layers and KV heads."""
    kl_divergence: float | None = None
    """Nats per token from the full cache's distribution, over the full cache's own answer, teacher-forced."""
    top1_agreement: float | None = None
    """Share of those tokens at which the arg-max equals the full cache's."""
    uncovered: float | None = None
    """The share of the window's attention that went to tokens which were not kept, where the budget is 'auto'."""
    predicted_loss: float | None = None
    """The KL divergence that was predicted from that."""
    prefill_s: float | None = None
    """Of the prefill that this configuration used, all of the example's where `shared_prefill`."""
    shared_prefill: bool = True
    select_s: float | None = None
    """Scoring, selecting and gathering."""
    decode_s: float | None = None
    """None where the answer was decoded beside others, as a row of one batch."""
    token_ids: list[int] | None = None
    """The generated tokens."""
    meta: dict[str, Any] = msgspec.field(default_factory=dict)
    """The example's: length, depth, ..."""
    store: str = NATIVE
    """In how many bits a number what is kept is held; see `compressing`."""
    seed: int = 0
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    """compresskv, torch, transformers, python, the model's name and dtype; how it was read: 'prefill', where noted."""

    @property
    def config(self) -> str:
        """What tables call it: 'full', 'snapkv @ 128'."""
        return config_name(self.method, self.budget, self.setting, self.store)

    @property
    def retained_fraction(self) -> float:
        """Mean share of the prompt's tokens that was kept."""
        return self.retained_tokens / self.prompt_tokens

    @property
    def key(self) -> tuple[str, str, str]:
        """What is kept once in a run: task, example, configuration."""
        return self.task, self.example, self.config

    @classmethod
    def from_dict(cls, row: Any) -> "Record":
        """The record whose fields `row` holds, as JSON has them.

        Raises:
            ValueError: it is none; the message names the field.
        """
        return convert(row, cls)


def config_name(method: str, budget: int | float | str | None, setting: str, store: str = NATIVE) -> str:
    """What tables call a configuration: 'full', 'snapkv @ 128', 'snapkv int8 @ 3% (agnostic)'."""
    name = method if store == NATIVE else f"{method} {store}"
    shown = f"{100 * budget:.12g}%" if isinstance(budget, float) else budget  # 1 is one token, 100% all
    name = name if budget is None else f"{name} @ {shown}"
    return name if setting == "aware" else f"{name} ({setting})"
