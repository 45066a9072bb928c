"""The measurements of a calibration: retrieval scores of heads, eviction errors of layers, what stores lose."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.cache.full import FullCache
from compresskv.cache.routed import RoutedLayer
from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.calibration.needles import (
    SUMMARY,
    WORDING,
    NeedleDocument,
    encode_questions,
    longest_question,
    read_needles,
    split_needles,
)
from compresskv.calibration.recall import rouge_1_recall
from compresskv.calibration.recording import CutLayer, SpanLayer
from compresskv.calibration.runs import RunLog
from compresskv.calibration.settings import CalibrationSettings
from compresskv.calibration.stores import document_losses, store_losses
from compresskv.errors import ModelError, ProfileError
from compresskv.methods.base import Method
from compresskv.methods.compresskv import CompressKV
from compresskv.models.decoding import decode, prefill
from compresskv.models.fingerprint import Fingerprint, fingerprint
from compresskv.models.place import input_device
from compresskv.models.shape import compressible_layers, decoder_config
from compresskv.profiles.layer_errors import l1_normalised
from compresskv.profiles.profile import Profile, Rows
from compresskv.system.progress import Progress
from compresskv.version import __version__

SUCCESS_RECALL = 0.5
"""A run counts if the answer's ROUGE-1 recall of the needle is above this (CompressKV, section 3.1)."""
CUT_TOKENS = 32
"""Tokens that each layer is cut to while its error is measured (CompressKV, section 3.3)."""


class NothingRetrievedError(ProfileError):
    """The model never answered with a needle, so there is nothing to score. `runs` holds what it answered."""

    def __init__(self, message: str, runs: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.runs = runs


class Measurement:
    """The measurements, over one plan of documents."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        log_folder: Path,
        settings: CalibrationSettings,
        on_progress: Progress,
    ) -> None:
        self.model, self.tokenizer, self.settings, self._on_progress = model, tokenizer, settings, on_progress
        self.fingerprint: Fingerprint = fingerprint(model)
        needles = read_needles(Path(settings.needles)) if settings.needles else read_needles()
        self.needles, _ = split_needles(needles)
        sentences = read_haystack([Path(path) for path in settings.haystack])
        self._haystack = Haystack(tokenizer, sentences)
        self.text_digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
        """Stands for the haystack's text."""
        # All that a run depends on beside the weights: runs of another kind must not be taken for finished.
        read = (asdict(settings), self.needles, sentences, WORDING, getattr(tokenizer, "chat_template", ""))
        by = (__version__, transformers.__version__, torch.__version__, model.dtype)
        content = hashlib.sha256(repr((read, by)).encode()).hexdigest()
        self.log = RunLog(log_folder / f"{self.fingerprint}-{content[:12]}.jsonl")

    def documents(self) -> Iterator[tuple[int, NeedleDocument]]:
        """(length, document) of the whole plan, short ones first."""
        reserved = self.settings.max_new_tokens + longest_question(self.tokenizer, self.needles)
        depths = self.settings.depths
        for length in sorted(self.settings.lengths):
            for rotation in range(self._num_rotations):
                yield length, self._haystack.document(length, rotation, depths, self.needles, reserved)

    def measure_heads(self) -> list[dict[str, Any]]:
        """Every run's scores, from the log or measured now.

        Raises:
            NothingRetrievedError: no run succeeded.
        """
        plan = list(self.documents())
        num_runs = sum(len(document.needles) for _, document in plan)
        done = 0
        runs = []
        for length, document in plan:
            keys = [("heads", document.name, needle.id) for _, needle in document.needles]
            if not all(key in self.log for key in keys):
                for key, run in self._head_runs(length, document):
                    self.log.add(key, run)
                    self._on_progress("retrieval heads", (done + keys.index(key) + 1) / num_runs)
            done += len(keys)
            self._on_progress("retrieval heads", done / num_runs)
            runs += [self.log[key] for key in keys]
        if not any(run["succeeded"] for run in runs):
            message = f"the model retrieved no needle in {len(runs)} runs, so its heads cannot be scored"
            raise NothingRetrievedError(message, runs)
        return runs

    def _head_runs(
        self, length: int, document: NeedleDocument
    ) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
        prefix, encoded = encode_questions(self.tokenizer, document, document.questions)
        config = decoder_config(self.model)
        cache = FullCache(self.model, lambda layer_idx, _: SpanLayer(layer_idx, config))
        self._read(prefix, cache)
        for (depth, needle), question in zip(document.needles, encoded, strict=True):
            key = ("heads", document.name, needle.id)
            if key in self.log:
                continue
            branch = cache.branch()
            for layer in branch.routed:
                layer.start(question.span)
            tokens = self._answer(question.suffix, branch)
            answer = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            recall = rouge_1_recall(answer, needle.needle)
            semantic, traditional = _scores(branch.routed, prefix + question.suffix, question.span, tokens)
            yield (
                key,
                {
                    "length": length,
                    "depth": depth,
                    "needle": needle.id,
                    "answer": answer,
                    "recall": round(recall, 4),
                    "succeeded": recall > SUCCESS_RECALL,
                    "semantic": semantic,
                    "traditional": traditional,
                },
            )

    def measure_errors(self, semantic: Rows) -> dict[str, tuple[float, ...]]:
        """Layer errors for each calibration set, L1-normalised."""
        per_length = self.settings.error_documents
        plan = [pair for i, pair in enumerate(self.documents()) if i % self._num_rotations < per_length]
        sums: dict[str, Tensor] = {}
        for done, (_, document) in enumerate(plan, start=1):
            sets = ["needle"] * len(document.needles) + ["summary"]
            key = ("errors", document.name, _digest(semantic))
            if key not in self.log:
                self.log.add(key, self._error_runs(document, semantic))
            for name, errors in zip(sets, self.log[key], strict=True):
                sums[name] = sums.get(name, torch.zeros(len(errors))) + torch.tensor(errors)
            self._on_progress("layer errors", done / len(plan))
        return {name: l1_normalised(total.tolist()) for name, total in sums.items()}

    def measure_losses(self, method: Method) -> tuple[dict[str, float], dict[str, float]]:
        """What packed stores lose, and what is lost where `method` keeps shares of a document before its questions are
        known, in nats per token of answers: means over questions. See `store_losses`, `document_losses`.
        """
        plan = self.losing_documents()
        found: list[list[dict[str, float]]] = []
        for done, document in enumerate(plan, start=1):
            key = ("losses", document.name, method.label)
            if key not in self.log:
                self.log.add(key, self._loss_runs(document, method))
            found += self.log[key]
            self._on_progress("what stores and shares lose", done / len(plan))
        by_store, by_share = (_means([one[part] for one in found]) for part in (0, 1))
        return by_store, by_share

    def losing_documents(self) -> list[NeedleDocument]:
        """Of each length one that is not among `replay_prompts`, if there are others."""
        own = min(self.settings.replay_documents, self._num_rotations - 1)
        return [document for i, (_, document) in enumerate(self.documents()) if i % self._num_rotations == own]

    def replay_prompts(self) -> list[list[int]]:
        """Token ids of the documents that are read twice, each with what precedes it in the chat template."""
        per_length = self.settings.replay_documents
        plan = [document for i, (_, document) in enumerate(self.documents()) if i % self._num_rotations < per_length]
        return [encode_questions(self.tokenizer, document, document.questions)[0] for document in plan]

    @property
    def _num_rotations(self) -> int:
        return self.settings.num_rotations or max(len(self.needles), len(self.settings.depths))

    def _error_runs(self, document: NeedleDocument, semantic: Rows) -> list[list[float]]:
        questions = [*document.questions, (SUMMARY, "")]
        prefix, encoded = encode_questions(self.tokenizer, document, questions)
        method = CompressKV().with_profile(self._heads_only(semantic))
        cache = FullCache(
            self.model,
            lambda layer_idx, _: CutLayer(layer_idx, self.model, method.score, method.window_size, CUT_TOKENS),
        )
        self._read(prefix, cache)
        results = []
        for question in encoded:
            branch = cache.branch()
            for layer in branch.routed:
                layer.start(len(prefix) + len(question.suffix))
            self._answer(question.suffix, branch)
            results.append([sum(layer.errors) for layer in branch.routed])
        return results

    def _loss_runs(self, document: NeedleDocument, method: Method) -> list[list[dict[str, float]]]:
        prefix, encoded = encode_questions(self.tokenizer, document, document.questions)
        config = decoder_config(self.model)
        cache = FullCache(self.model, lambda layer_idx, _: RoutedLayer(layer_idx, config))
        self._read(prefix, cache)
        runs = []
        for question in encoded:
            answer = self._answer(question.suffix, cache.branch())
            stores = store_losses(self.model, cache, question.suffix, answer)
            runs.append([stores, document_losses(self.model, cache, question.suffix, answer, method)])
        return runs

    def _heads_only(self, semantic: Rows) -> Profile:
        """A profile to select with before the layer errors are known."""
        count = len(semantic)
        return Profile(
            "", self.fingerprint, tuple(compressible_layers(self.model)), semantic, None, 0, {}, (1 / count,) * count
        )

    def _read(self, token_ids: list[int], cache: FullCache) -> None:
        logits = prefill(self.model, torch.tensor([token_ids], device=input_device(self.model)), cache)
        if not torch.isfinite(logits).all():
            raise ModelError("the model's output is NaN or infinite: its weights are damaged, or its dtype overflows")

    def _answer(self, suffix: list[int], cache: FullCache) -> list[int]:
        logits = prefill(self.model, torch.tensor([suffix], device=input_device(self.model)), cache)
        return decode(self.model, self.tokenizer, int(logits.argmax()), cache, self.settings.max_new_tokens)


def _scores(
    layers: Sequence[SpanLayer], prompt: list[int], span: slice, tokens: list[int]
) -> tuple[list[list[float]], list[list[float]]]:
    """(semantic, traditional) scores of one run, (L, H_q) each.

    Semantic: eq. 5, the mass on the whole needle at every step whose token is one of the needle's. Traditional: the
    share of steps, per needle token, at which the arg-max lies on a needle token equal to the one generated
    (Wu et al., arXiv 2404.15574, section 2).
    """
    needle = prompt[span]
    in_needle = torch.tensor([token in needle for token in tokens], dtype=torch.float32)
    ids = torch.tensor(prompt + tokens)
    semantic, traditional = [], []
    for layer in layers:
        mass = torch.stack(layer.mass).cpu()  # (steps, H_q)
        peaks = torch.stack(layer.peaks).cpu()
        on_span = (peaks >= span.start) & (peaks < span.stop)
        copied = on_span & (ids[peaks] == torch.tensor(tokens)[:, None])
        semantic.append(_rounded((mass * in_needle[:, None]).sum(dim=0)))
        traditional.append(_rounded(copied.float().sum(dim=0) / len(needle)))
    return semantic, traditional


def mean_scores(runs: list[dict[str, Any]]) -> tuple[Rows, Rows, int]:
    """(semantic scores, traditional scores, runs) over the runs that succeeded."""
    good = [run for run in runs if run["succeeded"]]
    means = [torch.tensor([run[name] for run in good]).mean(dim=0) for name in ("semantic", "traditional")]
    semantic, traditional = (tuple(tuple(_rounded(row)) for row in mean) for mean in means)
    return semantic, traditional, len(good)


def _rounded(row: Tensor) -> list[float]:
    return [round(float(number), 6) for number in row]


def _digest(rows: Rows) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:12]


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(one[name] for one in found) / len(found), 6) for name in found[0]}
