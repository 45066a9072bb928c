"""A whole run: stages one after another, the machine's limits between them, and the result as JSON."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from compresskv.bench.config import BenchConfig, Stage, within_budget
from compresskv.bench.contender import PLAIN, Contender
from compresskv.bench.limits import Limits, decode_nbytes, measure_limits, prefill_flop
from compresskv.bench.machine import describe, machine
from compresskv.bench.rounds import Sample, run_rounds
from compresskv.bench.row import Row, make_row
from compresskv.bench.subject import Subject
from compresskv.cache.costs import costs_of
from compresskv.errors import ModelError, first_line
from compresskv.selection.precision import PRECISIONS
from compresskv.system.libraries import versions
from compresskv.system.progress import Progress


class Bench:
    """Runs stages. What is done is there even where a run is interrupted."""

    def __init__(self, subject: Subject, config: BenchConfig) -> None:
        self.subject = subject
        self.config = config
        self._tokens: Tensor = subject.read_tokens(config.most_tokens)  # (1, N)
        self.rows: list[Row] = []
        self.limits: Limits | None = None
        """The best seen so far."""

    def run(
        self,
        stages: Sequence[Stage],
        progress: Progress,
        engine: str = "compresskv",
        on_rows: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure the stages, each in rounds; those whose rows are there are passed over.

        Args:
            on_rows: called when a stage's rows are there, those of its first round, too.
        Raises:
            ModelError: out of memory.
        """
        total = sum(map(self._work, stages))
        done = 0.0
        for stage in stages:
            if self._is_measured(stage, self.rows, engine):
                done += self._work(stage) / total
                continue
            self._note_limits()
            share = self._work(stage) / total / (self.config.repeats * len(stage.contenders))

            def on_step(share: float = share, length: int = stage.length) -> None:
                nonlocal done
                done += share
                progress(f"{length:,} tokens", min(done, 1.0))

            progress(f"{stage.length:,} tokens", done)
            before = self.rows

            def on_round(samples: list[list[Sample]], stage: Stage = stage, before: list[Row] = before) -> None:
                self.rows = [*before, *self._rows(stage, samples, engine)]
                self._note_reasons()
                on_rows()

            with _memory_explained(stage.length):
                run_rounds(
                    self.subject.model,
                    self._tokens[:, : stage.length],
                    stage.contenders,
                    num_rounds=self.config.repeats,
                    num_new_tokens=self.config.new_tokens,
                    on_step=on_step,
                    on_round=on_round,
                )
        self._note_limits()

    def take_over(self, rows: Sequence[Row], limits: Limits, notes: Sequence[str], stages: Sequence[Stage]) -> int:
        """Go on with an earlier run's rows, those of whole stages.

        Returns: how many of the stages need not be measured.
        """
        measured = [stage for stage in stages if self._is_measured(stage, rows)]
        lengths = {stage.length for stage in measured}
        self.rows = [row for row in rows if row.length in lengths]
        if measured:
            self.limits = limits
            self.subject.notes += [note for note in notes if note not in self.subject.notes]
        return len(measured)

    def measures(self, rows: Sequence[Row], stages: Sequence[Stage]) -> bool:
        """Whether all of an earlier run's rows are of what these stages measure, too."""
        wanted = {
            (stage.length, _engine(one, "compresskv"), one.method, one.decode, one.budget)
            for stage in stages
            for one in stage.contenders
        }
        return all((row.length, row.engine, row.method, row.decode, row.budget) in wanted for row in rows)

    def _is_measured(self, stage: Stage, rows: Sequence[Row], engine: str = "compresskv") -> bool:
        whole = (row for row in rows if row.length == stage.length and len(row.rounds) == self.config.repeats)
        there = {(row.engine, row.method, row.decode, row.budget) for row in whole}
        return all(
            (_engine(one, engine), one.method, one.decode, one.budget) in there
            for one in stage.contenders
            if one.max_prompt is None
        )

    def _note_reasons(self) -> None:
        reasons = {row.not_compiled for row in self.rows if row.not_compiled}
        notes = [f"not compiled, so generated eagerly: {reason}" for reason in sorted(reasons)]
        self.subject.notes += [note for note in notes if note not in self.subject.notes]

    def _work(self, stage: Stage) -> float:
        """In proportion to a stage's seconds, roughly."""
        return len(stage.contenders) * (stage.length + 100.0)

    def _note_limits(self) -> None:
        measured = measure_limits(self.subject.model.device, self.subject.model.dtype)
        self.limits = measured if self.limits is None else self.limits.best(measured)

    def _rows(self, stage: Stage, samples: Sequence[Sequence[Sample]], engine: str) -> list[Row]:
        rows = []
        for contender, own in zip(stage.contenders, samples, strict=True):
            if contender.max_prompt is None:
                place = stage.place_of_short(contender.budget)
                short = None if place is None else samples[place]
                rows.append(self._row(stage, contender, own, samples[0], short, engine))
        return rows

    def _row(
        self,
        stage: Stage,
        contender: Contender,
        own: Sequence[Sample],
        plain: Sequence[Sample],
        short: Sequence[Sample] | None,
        engine: str,
    ) -> Row:
        model, num_tokens = contender.model or self.subject.model, own[0].prefill.prompt_tokens
        precision = PRECISIONS[contender.store]
        costs = costs_of(model, precision) if isinstance(contender.budget, str) else None
        return make_row(
            contender,
            own,
            plain,
            short,
            engine=_engine(contender, engine),
            length=stage.length,
            within_budget=within_budget(contender.budget, num_tokens, costs),
            prefill_flop=prefill_flop(model, num_tokens),
            decode_nbytes=decode_nbytes(model, own[0].prefill.kv_nbytes),
        )

    def result(self) -> dict[str, Any]:
        """For JSON: rows in the order in which they were measured."""
        model, limits = self.subject.model, self.limits
        return {
            "versions": versions(),
            "machine": machine(model.device),
            "model": describe(model, self.subject.name, random=self.subject.random),
            "settings": asdict(self.config),
            "limits": None if limits is None else asdict(limits),
            "notes": self.subject.notes,
            "rows": [] if limits is None else [row.to_dict(limits) for row in self.rows],
        }


def _engine(contender: Contender, engine: str) -> str:
    return "transformers" if contender.method == PLAIN else engine


@contextmanager
def _memory_explained(length: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        if isinstance(err, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(err):
            problem = f": the caches do not fit into memory ({first_line(err)})"
            raise ModelError(problem, option="lengths", value=length) from err
        raise
