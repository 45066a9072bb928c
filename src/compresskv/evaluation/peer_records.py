"""Results of the peers' process become records like ours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compresskv.evaluation.peer_process import run_peers
from compresskv.evaluation.peer_request import PeerCase, PeerRequest
from compresskv.evaluation.records import Record, RecordLog, config_name
from compresskv.evaluation.runner import Case


def peer_records(
    python: Path,
    request: PeerRequest,
    cases: Sequence[Case],
    full: Mapping[tuple[str, str], Record],
    log: RecordLog,
    tokenizer: Any,
) -> Iterator[tuple[float, Record | str]]:
    """(share done, record or what went wrong) for every press, budget and setting that the log does not hold yet."""
