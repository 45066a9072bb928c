"""Measure kvpress beside plain transformers: `python -m compresskv.bench.peers --request FILE`.

It runs in the environment that `scripts/peers` makes. Each row is one line of JSON on stdout, and so is progress.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from compresskv.bench.contender import Contender
from compresskv.bench.peer_request import BenchRequest
from compresskv.bench.plan import stages
from compresskv.bench.press import PRESSES, Press
from compresskv.bench.run import Bench
from compresskv.bench.subject import Subject, random_subject, real_subject
from compresskv.errors import first_line
from compresskv.peers.answers import Write, answer_request
from compresskv.peers.presses import peer


def measure(request: BenchRequest, write: Write) -> None:
    """Run the request stage by stage, and write rows, progress, and what failed.

    Raises:
        ConfigError, ModelError: nothing can be run at all.
    """
    for name in PRESSES:
        peer(name)  # refuses an environment without kvpress before a model is loaded
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    plan = request.to_plan()
    bench = Bench(_subject(request), plan)
    all_stages = stages(plan, _presses)
    for number, stage in enumerate(all_stages):
        write({"message": f"{stage.length:,} tokens", "fraction": number / len(all_stages)})
        try:
            bench.run([stage], lambda message, fraction: None, engine="kvpress")
        except Exception as err:  # noqa: BLE001 - kvpress raises of all kinds, and other stages may still work
            write({"length": stage.length, "error": first_line(err)})
    for row in bench.result()["rows"]:
        write({**row, "versions": versions})


def _presses(budget: int | float) -> list[Contender]:
    return [Press(name, budget) for name in PRESSES]


def _subject(request: BenchRequest) -> Subject:
    name, dtype, device = request.model, request.dtype, request.device
    if request.num_layers is None:
        subject = real_subject(name, dtype=dtype, device=device)
    else:
        subject = random_subject(name, request.num_layers, len(request.input_ids), dtype=dtype, device=device)
    tokens = torch.tensor([request.input_ids], device=subject.model.device)  # just what our methods read
    subject.read_tokens = lambda count: tokens[:, :count]
    return subject


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Measure kvpress; one JSON line for each row.", "BenchRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    measure(BenchRequest.read(request), write)


if __name__ == "__main__":
    sys.exit(main())
