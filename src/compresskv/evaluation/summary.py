"""What runs found, as numbers: the tables of a report before they are text."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.records import Record, config_name
from compresskv.evaluation.run_folder import read_run
from compresskv.evaluation.statistics import macro_interval, macro_paired_difference
from compresskv.methods.registry import methods
from compresskv.selection.budgets import budget_order
from compresskv.system.check import suggestion

_SAME_BYTES = 1.1
"""Up to this factor. Whole chunks and lists for each KV head make small differences."""

CaseKey = tuple[str, str]  # example and prompt: another seed or length makes another case
Cases = dict[CaseKey, Record]
Documents = dict[CaseKey, tuple[int, str]]
Records = dict[tuple[str, str, CaseKey], Record]
"""By task, configuration and case."""
Read = tuple[str, str, str]
"""Model, dtype, and how prompts were read: 'exact', 'fast' or 'unknown'."""
Row = dict[str, Any]
Table = dict[str, Any]

_MEANS: dict[str, Callable[[Record], float | None]] = {
    "exact_match": lambda record: record.metrics.get("exact_match"),
    "rouge_1_recall": lambda record: record.metrics.get("rouge_1_recall"),
    "evidence_recall": lambda record: record.evidence_recall,
    "kl_divergence": lambda record: record.kl_divergence,
    "top1_agreement": lambda record: record.top1_agreement,
    "retained_tokens": lambda record: record.retained_tokens,
    "retained_fraction": lambda record: record.retained_fraction,
    "kv_nbytes": lambda record: record.kv_nbytes,
    "kv_fraction": lambda record: record.kv_nbytes / record.kv_nbytes_full,
    "select_s": lambda record: record.select_s,
}


def report_data(folders: Sequence[Path], own: Iterable[str] | None = None) -> dict[str, Any]:
    """Everything that a report says, JSON values only. Scores and shares are 0..1.

    The runs' records are pooled; of the same case and configuration in two runs, the later run counts. Models, dtypes
    of a model, and prompts read exactly and fast are kept apart; peers, which read exactly, stand beside either. A mean
    over tasks weighs each task alike.

    Args:
        own: methods to compare with the best of the others; None: those that are `ours`.
    Raises:
        DataError: a folder holds no run, or a malformed one, or there is no record at all.
        ConfigError: scipy is missing, or no record is of one of the `own` methods.
    """
    pooled = _pooled([record for folder in folders for record in read_run(folder)[1]])
    if not pooled:
        raise DataError(f"no records yet in {', '.join(map(repr, map(str, folders)))}")
    compared = _own_methods(own, {record.method for records in pooled.values() for record in records.values()})
    sections = [_section(*read, records, compared) for read, records in sorted(pooled.items())]
    return {"runs": [str(folder) for folder in folders], "models": sections}


def _pooled(records: Sequence[Record]) -> dict[Read, Records]:
    pooled: dict[Read, Records] = defaultdict(dict)
    for record in sorted(records, key=lambda one: not one.shared_prefill):  # stable; peers come last
        read = _read(record)
        beside = [read] if record.shared_prefill else [other for other in pooled if other[:2] == read[:2]]
        for one in beside or [read]:
            pooled[one][record.task, record.config, (record.example, record.prompt_sha256)] = record
    return pooled


def _read(record: Record) -> Read:
    model, dtype = record.versions.get("model", "unknown model"), record.versions.get("dtype", "unknown dtype")
    return model, dtype, record.versions.get("prefill", "unknown" if dtype == "bfloat16" else "exact")


def _own_methods(own: Iterable[str] | None, known: set[str]) -> frozenset[str]:
    names = {method.partition("[")[0] for method in known}
    if own is None:
        return frozenset(name for name, method in methods().items() if method.ours)
    for name in own:
        if name not in names | known:
            raise ConfigError(f"is no method of these runs{suggestion(name, sorted(names))}", option="own", value=name)
    return frozenset(own)


def _section(model: str, dtype: str, prefill: str, records: Records, own: frozenset[str]) -> dict[str, Any]:
    cells: dict[str, dict[str, Cases]] = defaultdict(lambda: defaultdict(dict))  # task -> configuration -> case
    for (task, config, case), record in records.items():
        cells[task][config][case] = record
    tasks = {task: _table(task, {task: cells[task]}, own) for task in sorted(cells)}
    groups: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        groups[task.partition("/")[0]].append(task)
    group_tables = []
    for group, members in groups.items():
        table = {**tasks[members[0]], "name": group}
        if len(members) > 1:
            table = _table(group, {task: cells[task] for task in members}, own)
        group_tables.append(table)
    overall = group_tables[0] if len(groups) == 1 else _table("all tasks", cells, own)
    return {
        "model": model,
        "dtype": dtype,
        "prefill": prefill,
        **_counts(list(records.values())),
        "overall": overall,
        "groups": group_tables,
        "tasks": list(tasks.values()),
        "heat_maps": [_heat_map(task, config, cells[task][config]) for task, config in _mappable(cells)],
    }


def _counts(records: list[Record]) -> dict[str, Any]:
    prompts = {record.prompt_sha256: record for record in records}
    # A prompt that a resumed run read again has another time.
    shared = {(record.prompt_sha256, record.prefill_s) for record in records if record.shared_prefill}
    versions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, version in record.versions.items():
            versions[name].add(version)
    lengths = [record.prompt_tokens for record in records]
    return {
        "num_records": len(records),
        "num_prefills": len(shared) + sum(not record.shared_prefill for record in records),
        "num_prompts": len(prompts),
        "num_truncated": sum(record.truncated_tokens > 0 for record in prompts.values()),
        "prompt_tokens": [min(lengths), max(lengths)],
        "seeds": sorted({record.seed for record in records}),
        "versions": {name: sorted(found) for name, found in sorted(versions.items()) if name not in ("model", "dtype")},
    }


def _table(name: str, cells: dict[str, dict[str, Cases]], own: frozenset[str]) -> Table:
    """A row for each configuration, over the tasks in `cells`."""
    configs = sorted({config for by_config in cells.values() for config in by_config})
    by_config = {
        config: {task: cases[config] for task, cases in cells.items() if config in cases} for config in configs
    }
    documents = _documents(cells)
    rows = [_row(config, tasks, documents, own) for config, tasks in by_config.items()]
    rows.sort(key=lambda row: (budget_order(row["budget"]), row["setting"], -_mean(row), row["config"]))
    scores = {
        config: {task: _scores(records) for task, records in tasks.items()} for config, tasks in by_config.items()
    }
    whole = [row for row in rows if row["num_tasks"] == len(cells)]
    rivals_of = {row["config"]: [one for one in whole if _rival(one, row, by_config)] for row in rows}
    for row in rows:
        rivals = rivals_of[row["config"]]
        full = [one for one in rows if _is_reference(one) and not _is_reference(row)]
        full.sort(key=lambda one: one["setting"] != row["setting"])  # stable: the row's own setting if there is one
        baselines = [one for one in rivals if not one["own"] and row["own"]]
        baselines.sort(key=lambda one: str(one["budget"]) != str(row["budget"]))  # of equal scores, the one at its own
        baseline = max(baselines, key=_mean, default=None)
        row["best_baseline"] = baseline and baseline["config"]
        row["from_best_baseline"] = baseline and _from(scores[row["config"]], scores[baseline["config"]], documents)
        row["from_full"] = _from(scores[row["config"]], scores[full[0]["config"]], documents) if full else None
        lean = all(row in rivals_of[one["config"]] for one in (row, *rivals))
        row["best"] = len(rivals) > 1 and lean and _mean(row) == max(map(_mean, rivals))
    return {"name": name, "tasks": list(cells), "rows": rows}


def _documents(cells: dict[str, dict[str, Cases]]) -> Documents:
    """What several cases are about, where a task tells; of another seed it is another."""
    return {
        case: (record.seed, str(record.meta["document"]))
        for by_config in cells.values()
        for cases in by_config.values()
        for case, record in cases.items()
        if "document" in record.meta
    }


def _row(config: str, tasks: dict[str, Cases], documents: Documents, own: frozenset[str]) -> Row:
    records = [list(cases.values()) for cases in tasks.values()]
    scores = [found for found in map(_scores, tasks.values()) if found]
    losses = [found for found in map(_losses, tasks.values()) if found]
    first = records[0][0]
    return {
        "config": config,
        "method": first.method,
        "series": config_name(first.method, None, first.setting, first.store),
        "budget": first.budget,
        "setting": first.setting,
        "store": first.store,
        "own": first.method.partition("[")[0] in own,
        "num_tasks": len(tasks),
        "num_cases": sum(map(len, records)),
        "score": list(macro_interval(scores, documents)) if scores else None,
        "kl_interval": list(macro_interval(losses, documents)) if losses else None,
        **{name: _macro_mean(records, value) for name, value in _MEANS.items()},
    }


def _rival(one: Row, row: Row, cases: dict[str, dict[str, Cases]]) -> bool:
    """Whether `one` may be compared with `row`: compressed in the same setting, to the same budget in the same store or
    to as many bytes; and never to more of them. Bytes are means over the cases that both have.

    Presses that mask without freeing hold the full cache at every budget: at that of all bytes only the budget counts.

    Args:
        cases: by configuration and task.
    """
    if one["method"] == "full" or one["score"] is None or one["setting"] != row["setting"]:
        return False
    its, own = _held(cases[one["config"]], cases[row["config"]])
    if its is None or own is None or its > _SAME_BYTES * own:
        return False
    if one["store"] == row["store"] and str(one["budget"]) == str(row["budget"]):
        return True
    return _SAME_BYTES * its >= own and _SAME_BYTES * one["kv_fraction"] < 1


def _held(a: dict[str, Cases], b: dict[str, Cases]) -> tuple[float | None, float | None]:
    """The bytes that two configurations hold, over the tasks and cases that both have; None where there are none."""
    common = {task: a[task].keys() & b[task].keys() for task in a.keys() & b.keys()}

    def mean(tasks: dict[str, Cases]) -> float | None:
        cases = [[tasks[task][case] for case in found] for task, found in common.items()]
        return _macro_mean(cases, _MEANS["kv_nbytes"])

    return mean(a), mean(b)


def _is_reference(row: Row) -> bool:
    """Whether it is the full cache as the model computes it."""
    return row["method"] == "full" and row["budget"] is None


def _scores(cases: Cases) -> dict[CaseKey, float]:
    return {case: record.metrics["score"] for case, record in cases.items() if "score" in record.metrics}


def _losses(cases: Cases) -> dict[CaseKey, float]:
    return {case: record.kl_divergence for case, record in cases.items() if record.kl_divergence is not None}


def _from(
    a: dict[str, dict[CaseKey, float]], b: dict[str, dict[CaseKey, float]], documents: Documents
) -> dict[str, float] | None:
    """How far `a` lies above `b`, over the tasks and cases that both have."""
    common = [(a[task], b[task]) for task in a if a[task] and b.get(task)]
    found = macro_paired_difference(common, documents)
    return None if found is None else found._asdict()


def _macro_mean(groups: list[list[Record]], value: Callable[[Record], float | None]) -> float | None:
    found = [[one for record in group if (one := value(record)) is not None] for group in groups]
    means = [sum(values) / len(values) for values in found if values]
    return sum(means) / len(means) if means else None


def _mappable(cells: dict[str, dict[str, Cases]]) -> list[tuple[str, str]]:
    """The tasks and configurations whose cases all lie at a length and a depth, and have a score."""
    return [
        (task, config)
        for task in sorted(cells)
        for config, cases in cells[task].items()
        if all({"length", "depth"} <= set(one.meta) and "score" in one.metrics for one in cases.values())
    ]


def _heat_map(task: str, config: str, cases: Cases) -> dict[str, Any]:
    places: dict[tuple[float, float], list[float]] = defaultdict(list)
    for record in cases.values():
        places[record.meta["depth"], record.meta["length"]].append(record.metrics["score"])
    depths, lengths = (sorted({place[axis] for place in places}) for axis in (0, 1))
    means = {place: sum(values) / len(values) for place, values in places.items()}
    first = next(iter(cases.values()))
    return {
        "task": task,
        "config": config,
        "series": config_name(first.method, None, first.setting, first.store),
        "budget": first.budget,
        "depths": depths,
        "lengths": lengths,
        "scores": [[means.get((depth, length)) for length in lengths] for depth in depths],
    }


def _mean(row: Row) -> float:
    return float(row["score"][0]) if row["score"] else -1.0
