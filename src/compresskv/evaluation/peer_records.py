"""Run the peers on the cases of an evaluation; their results become records like ours."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.evaluation.peer_process import run_peers
from compresskv.evaluation.peer_request import PeerCase, PeerRequest
from compresskv.evaluation.records import Record, RecordLog, config_name
from compresskv.evaluation.runner import Case

_OWN_FIELDS = {field.name for field in fields(Record)}


def add_peers(
    python: Path,
    request: PeerRequest,
    cases: Sequence[Case],
    log: RecordLog,
    tokenizer: PreTrainedTokenizerBase,
    shared: dict[str, Any],
) -> Iterator[tuple[float, str | None]]:
    """Run presses on the cases that the log lacks them for, and keep their records.

    The log must hold the full cache's records: its answers are what top-1 agreement is measured against. KL
    divergence is not measured, since the full cache's distributions stay in this process.

    Args:
        request: presses, budgets and settings; its cases are replaced.
        shared: the records' seed and versions; libraries of the peers' own environment replace ours.
    Returns: (share done, None) for each record kept, (share done, what went wrong) for each that failed.
    Raises:
        ConfigError, CompressKVError: as for `run_peers`.
    """
    wanted = [
        config_name(f"kvpress:{press}", budget, setting)
        for setting in request.settings
        for press in request.presses
        for budget in request.budgets
    ]
    by_id = {(case.example.task, case.example.id): case for case in cases}
    pending = {key: case for key, case in by_id.items() if not all(log.has(*key, config) for config in wanted)}
    if not pending:
        return
    answers = {(row.task, row.example): row.token_ids or [] for row in log.records() if row.budget is None}
    chosen = tuple(_peer_case(case, answers.get(key, [])) for key, case in pending.items())
    total = len(chosen) * len(wanted)
    asked = PeerRequest(**{**vars(request), "cases": chosen})
    with contextlib.closing(run_peers(python, asked)) as rows:
        for done, row in enumerate(rows, 1):
            key = row["task"], row["example"]
            config = config_name(row["method"], row["budget"], row["setting"])
            if "error" in row:
                yield done / total, f"{row['task']} {row['example']}, {config}: {row['error']}"
            elif not log.has(*key, config):
                log.add(_record(pending[key], row, tokenizer, shared))
                yield done / total, None


def _peer_case(case: Case, answer: list[int]) -> PeerCase:
    prompt = case.prompt
    return PeerCase(
        task=case.example.task,
        example=case.example.id,
        input_ids=tuple(prompt.input_ids),
        max_new_tokens=case.example.max_new_tokens,
        suffix_start=prompt.suffix_start if 0 < prompt.suffix_start < len(prompt.input_ids) else None,
        reference_ids=tuple(answer),
    )


def _record(case: Case, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]) -> Record:
    text = str(tokenizer.decode(row["token_ids"], skip_special_tokens=True)).strip()
    return Record(
        **{name: value for name, value in row.items() if name in _OWN_FIELDS and name != "versions"},
        prompt_sha256=case.prompt.sha256,
        prompt_tokens=len(case.prompt.input_ids),
        truncated_tokens=case.prompt.num_truncated,
        prediction=text,
        metrics=case.task.score(case.example, text),
        shared_prefill=False,
        meta=case.example.meta,
        seed=shared["seed"],
        versions={**shared["versions"], **row["versions"]},
    )
