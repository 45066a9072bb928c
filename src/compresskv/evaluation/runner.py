"""Run configurations over examples: each prompt is read once, and every configuration cuts its own cache from that."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.timing import EvictionTimer
from compresskv.errors import ConfigError
from compresskv.evaluation.encode import EncodedPrompt
from compresskv.evaluation.example import Example
from compresskv.evaluation.fidelity import (
    Fidelity,
    Reference,
    evidence_recall,
    fidelities,
    fidelity,
    reference,
)
from compresskv.evaluation.records import SETTINGS, Record, config_name
from compresskv.evaluation.task import Task
from compresskv.methods.base import Method
from compresskv.models.decoding import decode, decode_one_token, prefill
from compresskv.models.place import devices_of, input_device
from compresskv.plans.capture import CapturedPrompt
from compresskv.selection.precision import NATIVE
from compresskv.system.clock import now

__all__ = ["SETTINGS", "Case", "Configuration", "Runner"]


@dataclass(frozen=True)
class Configuration:
    """One way to compress: what a row of a table stands for."""

    label: str
    """The method's name, with the options that differ from its defaults: 'snapkv[window_size=32]'."""
    method: Method
    budget: int | float | str | None
    """None for the full cache."""
    setting: str = "aware"
    """'agnostic': the document is read and compressed before the question comes."""
    store: str = NATIVE
    """In how many bits a number what is kept is held; see `compressing`."""

    @property
    def name(self) -> str:
        """What tables call it, and what tells it from the others of a run."""
        return config_name(self.label, self.budget, self.setting, self.store)

    @property
    def profile_digest(self) -> str | None:
        """What tells the method's profile from others; None where it has none."""
        profile = getattr(self.method, "profile", None)
        return None if profile is None else profile.digest


@dataclass(frozen=True)
class Case:
    """An example, its task, and its prompt for this model."""

    task: Task
    example: Example
    prompt: EncodedPrompt


@dataclass(frozen=True)
class Runner:
    """Runs configurations on cases with one model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    answers: bool = True
    """Whether compressed caches decode an answer; without, only recall and fidelity are measured."""
    versions: dict[str, str] = field(default_factory=dict)
    exact_prefill: bool | None = None
    """As for `compressing`."""

    def run(self, case: Case, configurations: Sequence[Configuration]) -> Iterator[Record]:
        """One record for each configuration, in order, from one prefill."""
        methods = [configuration.method for configuration in configurations]
        window_size = max(1, *(method.num_observed() for method in methods))
        with routing(self.model):
            yield from _Reading(self, case, window_size).records(configurations)


class _Reading:
    """One prompt, read once."""

    def __init__(self, runner: Runner, case: Case, window_size: int) -> None:
        self._runner = runner
        self._case = case
        self._window_size = window_size
        self._devices = devices_of(runner.model)

    def _now(self) -> float:
        return now(*self._devices)

    def records(self, configurations: Sequence[Configuration]) -> Iterator[Record]:
        runner, prompt = self._runner, self._case.prompt
        captured = CapturedPrompt(runner.model, self._window_size, exact_prefill=runner.exact_prefill)
        document = None
        start = self._now()
        if any(configuration.setting == "agnostic" for configuration in configurations):
            logits = captured.read(prompt.input_ids[: prompt.suffix_start])
            document = captured.fork()
        rest = prompt.input_ids[len(captured.input_ids) :]
        if rest:  # nothing, where no question follows the document
            logits = captured.read(rest)
        self._prefill_s = self._now() - start
        first = int(logits.argmax())
        full = reference(runner.model, runner.tokenizer, captured.cache, first, self._case.example.max_new_tokens)
        joined = self._joined(configurations, captured, full)
        for configuration in configurations:
            if configuration.budget is None:
                yield self._full_record(configuration, captured, full)
            elif configuration.name in joined:
                yield joined[configuration.name]
            elif configuration.setting == "aware":
                yield self._record(configuration, captured, full, first)
            elif document is not None:
                yield self._record(configuration, document, full, None if rest else first)

    def _record(
        self, configuration: Configuration, captured: CapturedPrompt, full: Reference, first: int | None
    ) -> Record:
        """Cut, measure, decode. `first`: the answer's first token; None where the question is still to be read."""
        runner, prompt = self._runner, self._case.prompt
        ahead = full.token_ids[: configuration.method.lookahead]
        if ahead and configuration.setting != "aware":
            raise ConfigError(f"{configuration.name}: a method cannot look ahead before the question was read")
        if ahead and len(full.token_ids) <= len(ahead):  # it ends before anything would be evicted
            return self._full_record(configuration, captured, full)
        cache, select_s, ahead_s = self._cut(configuration, captured, ahead)
        measured = self._measured(cache, captured, select_s)
        if ahead:
            first = full.token_ids[len(ahead)]
        if first is None:
            rest = torch.tensor([prompt.input_ids[len(captured.input_ids) :]], device=input_device(runner.model))
            first = int(prefill(runner.model, rest, cache).argmax())
            measured["retained_tokens"] += rest.shape[1]
        measured |= _nearness(fidelity(runner.model, cache, full, len(ahead)))
        if runner.answers:
            measured |= self._answer(cache, [*ahead, first], ahead_s)
        return self._filled(configuration, measured)

    def _joined(
        self, configurations: Sequence[Configuration], captured: CapturedPrompt, full: Reference
    ) -> dict[str, Record]:
        """Records of those that need nothing but a reading of the full cache's answer, which they share."""
        runner = self._runner
        plain = [
            one
            for one in configurations
            if one.budget is not None and one.setting == "aware" and not one.method.lookahead and not runner.answers
        ]
        plain.sort(key=lambda one: one.store)
        cut = [self._cut(one, captured, []) for one in plain]
        near: list[Fidelity | None] = []
        for store in dict.fromkeys(one.store for one in plain):
            own = [cache for one, (cache, *_) in zip(plain, cut, strict=True) if one.store == store]
            near += fidelities(runner.model, captured, own, full, store)
        return {
            one.name: self._filled(one, self._measured(cache, captured, select_s) | _nearness(own))
            for one, (cache, select_s, _), own in zip(plain, cut, near, strict=True)
        }

    def _cut(
        self, configuration: Configuration, captured: CapturedPrompt, ahead: Sequence[int]
    ) -> tuple[CompressedCache, float, float]:
        """The cache, cut after it has read the first tokens of the answer, one by one as in decoding, if any.

        Returns: it, the seconds of cutting, and those of reading.
        """
        assert configuration.budget is not None
        timer, start = EvictionTimer(*self._devices), self._now()
        cache = captured.compress(configuration.method, configuration.budget, timer, configuration.store)
        adopted = self._now()
        for token in ahead:
            decode_one_token(self._runner.model, token, cache)
        read_s, late_s = self._now() - adopted, timer.eviction.seconds if ahead else 0.0
        return cache, adopted - start + late_s, read_s - late_s

    def _measured(self, cache: CompressedCache, captured: CapturedPrompt, select_s: float) -> dict[str, Any]:
        """What can be said of a cache as soon as it is cut."""
        layers = cache.compressed_layers
        return {
            "retained_tokens": sum(layer.mean_retained for layer in layers) / len(layers),
            "kv_nbytes": cache.nbytes,
            "kv_nbytes_full": captured.nbytes,
            "evidence_recall": evidence_recall(cache, self._case.prompt.evidence),
            "select_s": select_s,
        }

    def _answer(self, cache: CompressedCache, begun: list[int], begun_s: float) -> dict[str, Any]:
        """`begun`: the answer so far; all but its last token were read, in `begun_s`."""
        start = self._now()
        limit = self._case.example.max_new_tokens - len(begun) + 1
        token_ids = decode(self._runner.model, self._runner.tokenizer, begun[-1], cache, limit)
        decode_s = begun_s + self._now() - start
        return self._scored([*begun[:-1], *token_ids]) | {"decode_s": decode_s}

    def _scored(self, token_ids: list[int]) -> dict[str, Any]:
        # Not stripped: in code, indentation is part of the answer.
        text = str(self._runner.tokenizer.decode(token_ids, skip_special_tokens=True))
        return {
            "prediction": text,
            "metrics": self._case.task.score(self._case.example, text),
            "token_ids": token_ids,
        }

    def _full_record(self, configuration: Configuration, captured: CapturedPrompt, full: Reference) -> Record:
        measured = {
            "retained_tokens": float(len(self._case.prompt.input_ids)),
            "kv_nbytes": captured.nbytes,
            "kv_nbytes_full": captured.nbytes,
            "evidence_recall": 1.0 if self._case.prompt.evidence else None,
            "kl_divergence": 0.0,
            "top1_agreement": 1.0,
            "select_s": 0.0,
            "decode_s": full.decode_s,
        }
        return self._filled(configuration, measured | self._scored(full.token_ids))

    def _filled(self, configuration: Configuration, measured: dict[str, Any]) -> Record:
        case, digest = self._case, configuration.profile_digest
        return Record(
            task=case.example.task,
            example=case.example.id,
            method=configuration.label,
            budget=configuration.budget,
            setting=configuration.setting,
            store=configuration.store,
            prompt_sha256=case.prompt.sha256,
            prompt_tokens=len(case.prompt.input_ids),
            truncated_tokens=case.prompt.num_truncated,
            prefill_s=self._prefill_s,
            meta=case.example.meta,
            seed=self._runner.seed,
            versions=self._runner.versions | ({"profile": digest} if digest else {}),
            **measured,
        )


def _nearness(near: Fidelity | None) -> dict[str, float | None]:
    return {
        "kl_divergence": None if near is None else near.kl_divergence,
        "top1_agreement": None if near is None else near.top1_agreement,
    }
