"""Other libraries that are measured beside ours: what their processes are asked, and the rows that come of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compresskv.bench.config import BenchConfig
from compresskv.bench.row import Row
from compresskv.bench.subject import Subject
from compresskv.errors import ConfigError
from compresskv.models.embedded import EMBEDDED
from compresskv.models.quantize import weights_dtype
from compresskv.peers.process import KVPRESS, LLAMA_CPP, VLLM, Environment, peers_python, run_peers


@dataclass(frozen=True)
class Peer:
    """Another library."""

    module: str
    """Its `answer` takes a `BenchRequest`."""
    environment: Environment
    """Runs the module."""
    takes_random: bool = False
    """Whether it can be given a geometry with random weights."""
    reads: str = ""
    """The ending of the only files that it reads, beside embedded models."""


PEERS = {
    "kvpress": Peer("compresskv.bench.press", KVPRESS, takes_random=True),
    "vllm": Peer("compresskv.bench.engine", VLLM),
    "llama.cpp": Peer("compresskv.bench.engine", LLAMA_CPP, reads=".gguf"),
}
"""By name."""


@dataclass(frozen=True)
class BenchRequest:
    """A model, tokens that prompts are the beginnings of, and what is measured."""

    peer: str
    """One of `PEERS`."""
    model: str
    """A geometry's name where `num_layers` is given."""
    num_layers: int | None
    dtype: str
    device: str
    input_ids: tuple[int, ...]
    config: BenchConfig
    num_threads: int
    """That this process computes with."""


def find_peer(name: str, model: str, *, random: bool) -> Path:
    """The python of a peer's environment.

    Args:
        model: its name, folder or file, or the name of a geometry with random weights.
    Raises:
        ConfigError: there is none, or the peer cannot be given the model.
    """
    peer = PEERS[name]
    if random and not peer.takes_random:
        raise ConfigError(f"needs a real model, not random={model!r}", option="peers", value=name)
    if not random and model not in EMBEDDED and not model.endswith(peer.reads):
        raise ConfigError(f"reads {peer.reads} files, and model={model!r} is none", option="peers", value=name)
    return peers_python(environment=peer.environment)


def measure_peer(
    name: str,
    python: Path,
    subject: Subject,
    config: BenchConfig,
    plain: Sequence[Row],
    progress: Callable[[str, float], None],
) -> Iterator[dict[str, Any]]:
    """Measure a peer on the same prompts; kvpress in rounds with the plain transformers of its own environment.

    Args:
        plain: this environment's rows of plain transformers. Engines, which have no transformers beside them, are
            compared with their medians, as 'prefill_ratio', 'first_token_ratio' and 'decode_ratio'.
    Returns: rows as of `Row.to_dict`, each with 'versions', as they come. What failed is told in the subject's notes.
    Raises:
        ConfigError, CompressKVError: as for `run_peers`.
    """
    model = subject.model
    request = BenchRequest(
        peer=name,
        model=subject.name.removeprefix("random "),
        num_layers=model.config.num_hidden_layers if subject.random else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        input_ids=tuple(subject.read_tokens(config.most_tokens)[0].tolist()),
        config=config,
        num_threads=torch.get_num_threads(),
    )
    peer = PEERS[name]
    if weights_dtype(model) == "int8":
        subject.notes.append(f"{name} computes with {request.dtype} weights, the others with 8-bit ones: no fair peer")
    for line in run_peers(python, request, peer.module, peer.environment):
        if "error" in line:
            subject.notes.append(f"{name} at {line['length']:,} tokens failed: {line['error']}")
        elif "fraction" in line:
            progress(f"{name}: {line['message']}", line["fraction"])
        else:
            if weights := line.get("weights"):
                note = (
                    f"{name} computes with the file's {weights} weights, the others with {request.dtype} made of them"
                )
                subject.notes += [] if note in subject.notes else [note]
            yield line if peer.takes_random else {**line, **_ratios(line, plain)}


def _ratios(row: dict[str, Any], plain: Sequence[Row]) -> dict[str, float]:
    same = [one for one in plain if one.prompt_tokens == row["prompt_tokens"]]
    figures = ("prefill", "s"), ("first_token", "s"), ("decode", "ms")
    return {
        f"{name}_ratio": row[f"{name}_{unit}"] / getattr(one, f"{name}_{unit}")
        for one in same
        for name, unit in figures
    }
