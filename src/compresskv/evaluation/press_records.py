"""Run kvpress's presses on the cases of an evaluation; their results become records like ours."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.evaluation.method_runner import Case
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.evaluation.records import Record, config_name
from compresskv.evaluation.run_folder import RecordLog
from compresskv.peers.process import run_peers

_ANSWERS = "compresskv.evaluation.press_runner"
"""The module that answers a request."""
_OWN_FIELDS = set(Record.__struct_fields__)


def add_presses(
    python: Path,
    request: PressRequest,
    cases: Sequence[Case],
    log: RecordLog,
    tokenizer: PreTrainedTokenizerBase,
    shared: dict[str, Any],
    own_settings: bool = False,
) -> Iterator[tuple[float, str | None]]:
    """Run the presses and budgets that the log lacks, and keep their records.

    The log must hold the full cache's records: KL divergence and top-1 agreement are measured over its answers,
    against what the full cache thinks of them in the peers' own environment.

    Args:
        request: presses, budgets and settings; its cases are replaced.
        shared: the records' seed and versions; libraries of the peers' own environment replace ours.
        own_settings: of each task, only its own setting is run.
    Returns: (share done, None) for each record kept, (share done, what went wrong) for each that failed.
    Raises:
        ConfigError, CompressKVError: as for `run_peers`.
    """
    by_id = {(case.example.task, case.example.id): case for case in cases}
    asked = replace(request, cases=tuple(_pending(request, by_id, log, own_settings)))
    total = sum(len(asked.pending(case)) for case in asked.cases)
    if not total:
        return
    with contextlib.closing(run_peers(python, asked, _ANSWERS)) as rows:
        for done, row in enumerate(rows, 1):
            if "error" in row:
                config = config_name(row["method"], row["budget"], row["setting"])
                yield done / total, f"{row['task']} {row['example']}, {config}: {row['error']}"
            else:
                log.add(_record(by_id[row["task"], row["example"]], row, tokenizer, shared))
                yield done / total, None


def _pending(
    request: PressRequest, cases: dict[tuple[str, str], Case], log: RecordLog, own_settings: bool
) -> Iterator[PressCase]:
    """The cases that lack a record, each with the configurations that it has or is not to have."""
    answers = {(row.task, row.example): row.token_ids or [] for row in log.records() if row.budget is None}
    configs = request.configs()
    for key, case in cases.items():
        done = tuple(
            name
            for name, (setting, *_) in configs.items()
            if log.has(*key, name) or (own_settings and setting != case.task.setting)
        )
        if len(done) < len(configs):
            yield _press_case(case, answers.get(key, []), done)


def _press_case(case: Case, answer: list[int], done: tuple[str, ...]) -> PressCase:
    prompt = case.prompt
    return PressCase(
        task=case.example.task,
        example=case.example.id,
        input_ids=tuple(prompt.input_ids),
        max_new_tokens=case.example.max_new_tokens,
        suffix_start=prompt.suffix_start if 0 < prompt.suffix_start < len(prompt.input_ids) else None,
        reference_ids=tuple(answer),
        done=done,
    )


def _record(case: Case, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]) -> Record:
    text = str(tokenizer.decode(row["token_ids"], skip_special_tokens=True))  # unstripped, as `Runner` has it
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
