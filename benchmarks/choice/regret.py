"""How far each candidate falls behind the best one, and which of them to choose by the worst case.

A cell is a model, a group of tasks and a budget. A candidate's loss there is its mean KL divergence from the full
cache over the cell's cases; its regret is that loss over the least one in the cell. The choice is the candidate whose
largest regret is least, so that no model and no kind of task pays for another.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from compresskv.evaluation.records import Record

NEGLIGIBLE = 0.05
"""Nats per token that are added to both losses of a ratio: between losses far below, differences mean nothing."""


class Cell(NamedTuple):
    """Where candidates are compared."""

    model: str
    group: str
    budget: int | float | str

    def __str__(self) -> str:
        return f"{self.model}, {self.group} at {self.budget}"


Losses = Mapping[Cell, Mapping[str, float]]
"""The mean loss of each candidate in each cell."""


@dataclass(frozen=True)
class Worst:
    """A candidate's largest regret, where that is, and its geometric mean over the cells."""

    regret: float
    cell: Cell
    mean: float


@dataclass(frozen=True)
class Turn:
    """Chosen on the other models, judged on the one left out."""

    held_out: str
    chosen: str
    seen: Worst
    """On the models that it was chosen on."""
    unseen: Worst
    """On the model left out."""


def losses(records: Iterable[Record], group_of: Callable[[str], str]) -> Losses:
    """Mean KL divergence of each method in each cell, over the cases that all of the cell's methods have.

    Args:
        group_of: the group of a task.
    """
    found: dict[Cell, dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.budget is not None and record.kl_divergence is not None:
            cell = Cell(record.versions["model"], group_of(record.task), record.budget)
            found[cell][record.method][record.task, record.example] = record.kl_divergence
    means = {}
    for cell, by_method in sorted(found.items(), key=lambda item: tuple(map(str, item[0]))):
        shared = set.intersection(*(set(cases) for cases in by_method.values()))
        if shared:
            means[cell] = {
                method: math.fsum(cases[case] for case in shared) / len(shared) for method, cases in by_method.items()
            }
    return means


def worst(losses: Losses, candidate: str) -> Worst:
    """Where a candidate falls furthest behind the best.

    Raises:
        ValueError: there is no cell.
        KeyError: the candidate is missing in one.
    """
    regrets = {cell: (own[candidate] + NEGLIGIBLE) / (min(own.values()) + NEGLIGIBLE) for cell, own in losses.items()}
    cell = max(regrets, key=lambda cell: regrets[cell])
    return Worst(regrets[cell], cell, math.exp(math.fsum(map(math.log, regrets.values())) / len(regrets)))


def choose(losses: Losses, candidates: Sequence[str]) -> str:
    """The candidate with the least largest regret; of equal ones, the first.

    Raises:
        ValueError, KeyError: as for `worst`, or there is no candidate.
    """
    return min(candidates, key=lambda candidate: worst(losses, candidate).regret)


def leave_one_out(losses: Losses, candidates: Sequence[str]) -> list[Turn]:
    """For each model, the choice on the others and its regret there; none where there is one model only."""
    turns = []
    models = sorted({cell.model for cell in losses})
    for held_out in models if len(models) > 1 else ():
        seen = {cell: own for cell, own in losses.items() if cell.model != held_out}
        unseen = {cell: own for cell, own in losses.items() if cell.model == held_out}
        chosen = choose(seen, candidates)
        turns.append(Turn(held_out, chosen, worst(seen, chosen), worst(unseen, chosen)))
    return turns
