"""Run our methods on cases, as `press_runner` runs kvpress's presses.

Each prompt is read once, and every configuration cuts its own cache from that.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.timing import EvictionTimer
from compresskv.errors import ConfigError
from compresskv.evaluation.configurations import FULL, Configuration
from compresskv.evaluation.encode import EncodedPrompt
from compresskv.evaluation.fidelity import Fidelity, evidence_recall, fidelities, fidelity, reference
from compresskv.evaluation.records import Record
from compresskv.evaluation.tasks.base import Task
from compresskv.evaluation.tasks.example import Example
from compresskv.models.decoding import decode, decode_one_token, decode_rows, last_logits
from compresskv.models.place import devices_of, input_device
from compresskv.plans.capture import CapturedPrompt
from compresskv.system.clock import now

_LITTLE = 1 << 28  # bytes
_MAX_LOG_PROBS = 1 << 25  # 128 MiB of float32


_Cut = tuple[Configuration, CompressedCache, float]
"""A configuration, what it keeps, and the seconds of cutting."""


def _kind(configuration: Configuration) -> str | tuple[str, str]:
    """What tells which configurations may be run side by side: their setting and store."""
    if configuration.budget is None:
        return FULL
    return "ahead" if configuration.method.lookahead else (configuration.setting, configuration.store)


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
        return self.run_together([(case, configurations)])

    def run_together(self, asked: Sequence[tuple[Case, Sequence[Configuration]]]) -> Iterator[Record]:
        """`run` for several questions on one document, which is read, and cut for the agnostic setting, once.

        Args:
            asked: cases whose prompts have `EncodedPrompt.document` in common.
        """
        every = [configuration for _, configurations in asked for configuration in configurations]
        window_size = max(1, *(configuration.method.num_observed() for configuration in every))
        apart = len(asked) > 1 or any(configuration.setting == "agnostic" for configuration in every)
        with routing(self.model):
            document = _Document(self, asked[0][0].prompt.document if apart else [], window_size)
            for case, configurations in asked:
                yield from _Reading(self, case, document).records(configurations)


class _Document:
    """What prompts begin with, read once."""

    def __init__(self, runner: Runner, token_ids: list[int], window_size: int) -> None:
        """Read it.

        Args:
            token_ids: none where prompts are read as a whole.
        """
        self._devices = devices_of(runner.model)
        self.captured = CapturedPrompt(runner.model, window_size, exact_prefill=runner.exact_prefill)
        start = now(*self._devices)
        self.logits = self.captured.read(token_ids) if token_ids else None
        self.seconds = now(*self._devices) - start
        self._cut: dict[str, tuple[CompressedCache, float]] = {}

    def cut(self, configuration: Configuration) -> tuple[CompressedCache, float]:
        """What a configuration keeps of it, which is not to be written to, and the seconds of cutting."""
        if configuration.name not in self._cut:
            self._cut[configuration.name] = self.cut_of(self.captured, configuration)
        return self._cut[configuration.name]

    def cut_of(self, captured: CapturedPrompt, configuration: Configuration) -> tuple[CompressedCache, float]:
        """As `cut`, of what was read further."""
        assert configuration.budget is not None
        timer, start = EvictionTimer(*self._devices), now(*self._devices)
        cache = captured.compress(configuration.method, configuration.budget, timer, configuration.store)
        return cache, now(*self._devices) - start


class _Reading:
    """One prompt: what is left of it after its document is read, too."""

    def __init__(self, runner: Runner, case: Case, document: _Document) -> None:
        self._runner = runner
        self._case = case
        self._document = document
        self._devices = devices_of(runner.model)
        self._captured = document.captured.fork()
        self._rest = case.prompt.input_ids[len(self._captured.input_ids) :]
        start, logits = now(*self._devices), document.logits
        if self._rest:  # nothing, where no question follows the document
            logits = self._captured.read(self._rest)
        assert logits is not None
        self._prefill_s = document.seconds + now(*self._devices) - start
        self._first = int(logits.argmax())
        """The full cache's first token."""
        self._full = reference(
            runner.model, runner.tokenizer, self._captured.cache, self._first, case.example.max_new_tokens
        )

    def _now(self) -> float:
        return now(*self._devices)

    def records(self, configurations: Sequence[Configuration]) -> Iterator[Record]:
        for kind, group in itertools.groupby(configurations, _kind):
            if isinstance(kind, tuple):
                yield from self._joined(group, kind[0] == "agnostic")
            else:
                yield from map(self._full_record if kind == FULL else self._ahead_record, group)

    def _joined(self, configurations: Iterable[Configuration], agnostic: bool) -> Iterator[Record]:
        """Records of one setting and store: the caches are the rows of one, as far as memory goes."""
        cut: list[_Cut] = []
        for configuration in configurations:
            one = (
                self._document.cut(configuration) if agnostic else self._document.cut_of(self._captured, configuration)
            )
            if not self._fits([cache for _, cache, _ in cut] + [one[0]]):
                yield from self._side_by_side(cut, agnostic)
                cut = []
            cut.append((configuration, *one))
        yield from self._side_by_side(cut, agnostic)

    def _fits(self, caches: Sequence[CompressedCache]) -> bool:
        """Whether these may be rows of one cache: it holds no more than the prompt's own, or than little."""
        held = len(caches) * max(cache.nbytes for cache in caches)
        bounded = held <= max(self._captured.nbytes, _LITTLE)
        return len(caches) == 1 or (bounded and len(caches) * self._full.log_probs.numel() <= _MAX_LOG_PROBS)

    def _side_by_side(self, cut: Sequence[_Cut], agnostic: bool) -> Iterator[Record]:
        """Measure and decode them as rows of one batch."""
        runner = self._runner
        source, rest = (self._document.captured, self._rest) if agnostic else (self._captured, [])
        cache = source.side_by_side([cache for _, cache, _ in cut], cut[0][0].store)
        firsts = [self._first] * len(cut)
        if rest:
            question = torch.tensor([rest] * len(cut), device=input_device(runner.model))
            firsts = last_logits(runner.model, question, cache).argmax(dim=-1).tolist()
        near = fidelities(runner.model, cache, self._full, len(cut))
        limit = self._case.example.max_new_tokens
        answers = decode_rows(runner.model, runner.tokenizer, firsts, cache, limit) if runner.answers else None
        for at, (configuration, own, select_s) in enumerate(cut):
            measured = self._measured(own, source, select_s) | _nearness(near[at])
            measured["retained_tokens"] += len(rest)
            yield self._filled(configuration, measured | (self._scored(answers[at]) if answers else {}))

    def _ahead_record(self, configuration: Configuration) -> Record:
        """Of a method that looks ahead: it is cut after it has read its first tokens, one by one as in decoding."""
        runner, full = self._runner, self._full
        if configuration.setting != "aware":
            raise ConfigError(f"{configuration.name}: a method cannot look ahead before the question was read")
        ahead = full.token_ids[: configuration.method.lookahead]
        if len(full.token_ids) <= len(ahead):  # it ends before anything would be evicted
            return self._full_record(configuration)
        cache, select_s, ahead_s = self._cut_ahead(configuration, ahead)
        measured = self._measured(cache, self._captured, select_s)
        measured |= _nearness(fidelity(runner.model, cache, full, len(ahead)))
        if runner.answers:
            measured |= self._answer(cache, [*ahead, full.token_ids[len(ahead)]], ahead_s)
        return self._filled(configuration, measured)

    def _cut_ahead(self, configuration: Configuration, ahead: Sequence[int]) -> tuple[CompressedCache, float, float]:
        """Returns: the cache, the seconds of cutting, and those of reading `ahead`."""
        assert configuration.budget is not None
        timer, start = EvictionTimer(*self._devices), self._now()
        cache = self._captured.compress(configuration.method, configuration.budget, timer, configuration.store)
        adopted = self._now()
        for token in ahead:
            decode_one_token(self._runner.model, token, cache)
        read_s, late_s = self._now() - adopted, timer.eviction.seconds
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
            **{
                name: getattr(choice, name) for choice in cache.auto_choices for name in ("uncovered", "predicted_loss")
            },
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

    def _full_record(self, configuration: Configuration) -> Record:
        nbytes = self._captured.nbytes
        measured = {
            "retained_tokens": float(len(self._case.prompt.input_ids)),
            "kv_nbytes": nbytes,
            "kv_nbytes_full": nbytes,
            "evidence_recall": 1.0 if self._case.prompt.evidence else None,
            "kl_divergence": 0.0,
            "top1_agreement": 1.0,
            "select_s": 0.0,
            "decode_s": self._full.decode_s,
        }
        return self._filled(configuration, measured | self._scored(self._full.token_ids))

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
