"""What the peers' process is asked to measure, and its rows as this process gets them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskv.bench.plan import Plan
from compresskv.bench.subject import Subject
from compresskv.evaluation.peer_process import KVPRESS, VLLM, peers_python, run_peers

PEERS = {"kvpress": ("compresskv.bench.peers", KVPRESS), "vllm": ("compresskv.bench.vllm_peer", VLLM)}
"""By name: the module that answers a request, and the environment that it runs in."""


@dataclass(frozen=True)
class BenchRequest:
    """A model, tokens that prompts are the beginnings of, and a plan."""

    model: str
    """A geometry's name where `num_layers` is given."""
    num_layers: int | None
    dtype: str
    device: str
    input_ids: tuple[int, ...]
    plan: dict[str, Any]

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "BenchRequest":
        """Load what `write` stored."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def to_plan(self) -> Plan:
        """The plan, whose tuples JSON made lists of."""
        lists = {name: tuple(self.plan[name]) for name in ("lengths", "budgets", "decode")}
        return Plan(**{**self.plan, **lists})


def find_peer(name: str) -> Path:
    """The python of a peer's environment.

    Raises:
        ConfigError: there is none.
    """
    return peers_python(environment=PEERS[name][1])


def measure_peer(
    name: str, python: Path, subject: Subject, plan: Plan, progress: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Measure a peer on the same prompts; kvpress in rounds with the plain transformers of its own environment.

    Returns: rows as of `Row.to_dict`, each with 'versions'. What failed is told in the subject's notes.
    Raises:
        ConfigError, CompressKVError: as for `run_peers`.
    """
    model = subject.model
    request = BenchRequest(
        model=subject.name.removeprefix("random "),
        num_layers=model.config.num_hidden_layers if subject.random else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        input_ids=tuple(subject.read_tokens(plan.most_tokens)[0].tolist()),
        plan=asdict(plan),
    )
    rows: list[dict[str, Any]] = []
    module, environment = PEERS[name]
    for line in run_peers(python, request, module, environment):
        if "error" in line:
            subject.notes.append(f"{name} at {line['length']:,} tokens failed: {line['error']}")
        elif "fraction" in line:
            progress(f"{name}: {line['message']}", line["fraction"])
        else:
            rows.append(line)
    return rows
