"""LongBench: the English and code tasks of Bai et al., arXiv 2308.14508, with its own prompts and metrics."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from compresskv.errors import DataError, first_line
from compresskv.evaluation.tasks import metrics
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.jsonl import Folder, Line, existing_files, read_lines, task_folder
from compresskv.evaluation.tasks.registry import register_task
from compresskv.models.hub import is_reachable
from compresskv.system.convert import Text
from compresskv.system.inputs import read_json
from compresskv.system.paths import is_file

HUB_REPOSITORY = "THUDM/LongBench"
_PROMPTS, _LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
_NEEDS = (
    f"{_PROMPTS} and {_LENGTHS}, both from the config folder of github.com/{HUB_REPOSITORY}; "
    "*.jsonl beside them are the rows, which are downloaded from the hub where there are none"
)


@dataclass(frozen=True)
class _Subset:
    category: str
    metric: Callable[..., float]
    chat: bool = True
    """False where LongBench gives the prompt to chat models as it is."""
    one_line: bool = False
    """Whether only the answer's first line counts."""


_SUBSETS = {
    "narrativeqa": _Subset("single-doc QA", metrics.qa_f1),
    "qasper": _Subset("single-doc QA", metrics.qa_f1),
    "multifieldqa_en": _Subset("single-doc QA", metrics.qa_f1),
    "hotpotqa": _Subset("multi-doc QA", metrics.qa_f1),
    "2wikimqa": _Subset("multi-doc QA", metrics.qa_f1),
    "musique": _Subset("multi-doc QA", metrics.qa_f1),
    "gov_report": _Subset("summarisation", metrics.rouge_l),
    "qmsum": _Subset("summarisation", metrics.rouge_l),
    "multi_news": _Subset("summarisation", metrics.rouge_l),
    "trec": _Subset("few-shot", metrics.classification, chat=False, one_line=True),
    "triviaqa": _Subset("few-shot", metrics.qa_f1, chat=False, one_line=True),
    "samsum": _Subset("few-shot", metrics.rouge_l, chat=False, one_line=True),
    "passage_count": _Subset("synthetic", metrics.count),
    "passage_retrieval_en": _Subset("synthetic", metrics.retrieval),
    "lcc": _Subset("code", metrics.code_sim, chat=False),
    "repobench-p": _Subset("code", metrics.code_sim, chat=False),
}


class _Row(msgspec.Struct):
    id: Text = msgspec.field(name="_id")
    context: Text
    answers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    length: Annotated[int, msgspec.Meta(ge=0)]
    input: str | None = None
    all_classes: list[str] | None = None


@register_task
class LongBench(Task):
    """Question answering, summaries, few-shot learning, synthetic tasks and code completion over long documents."""

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "16 English and code tasks of LongBench, from its data files"
    default_subsets: ClassVar[tuple[str, ...]] = tuple(_SUBSETS)
    needs = _NEEDS
    metrics: ClassVar[Mapping[str, str]] = {
        "score": "LongBench's own metric of the subset: F1, ROUGE-L, accuracy or edit similarity"
    }

    def examples(self, settings: TaskSettings) -> list[Example]:
        """The rows of every chosen subset whose file exists; see `Task.examples`."""
        files = {subset: f"{subset}.jsonl" for subset in self.chosen_subsets(settings)}
        folder = task_folder(self.name, settings.data, self.needs)
        prompts, lengths = (_table(folder, name) for name in (_PROMPTS, _LENGTHS))
        rows: Folder = folder if any(is_file(folder / f"{subset}.jsonl") for subset in _SUBSETS) else _hub(folder)
        cases = []
        for subset, name in existing_files(rows, files, settings).items():
            prompt, max_new_tokens = _prompt(prompts, subset), _max_new_tokens(lengths, subset)
            seen: set[str] = set()
            for line in read_lines(rows, name, _Row, settings.limit):
                case = _example(subset, line, prompt, max_new_tokens)
                if case.id in seen:
                    raise line.error(f"the _id {case.id!r} occurs twice")
                seen.add(case.id)
                cases.append(case)
        return cases

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """LongBench's metric of the subset, the best over the answers."""
        subset = _SUBSETS[example.task.removeprefix("longbench/")]
        metric = subset.metric
        if metric is metrics.classification:
            metric = partial(metric, all_classes=example.meta["all_classes"])
        line = metrics.answer_line(prediction) if subset.one_line else prediction
        return {"score": metrics.best_of(metric, line, example.answers)}


def _example(subset: str, line: Line[_Row], prompt: tuple[str, str], max_new_tokens: int) -> Example:
    row, kind = line.row, _SUBSETS[subset]
    meta: dict[str, Any] = {"length": row.length, "category": kind.category}
    if row.all_classes:
        meta["all_classes"] = row.all_classes
    elif kind.metric is metrics.classification:
        raise line.error("field 'all_classes' is empty or missing")
    prefix, suffix = (template.format(input=row.input or "") for template in prompt)
    return Example(
        task=f"longbench/{subset}",
        id=row.id,
        prefix=prefix,
        context=row.context,
        suffix=suffix,
        answers=row.answers,
        max_new_tokens=max_new_tokens,
        chat=kind.chat,
        meta=meta,
    )


def _table(folder: Path, name: str) -> dict[str, Any]:
    try:
        table = read_json(folder / name)
    except FileNotFoundError as err:
        raise DataError(f"{folder}: no {name}; task 'longbench' needs {_NEEDS}") from err
    except (OSError, ValueError) as err:
        raise DataError(f"{folder / name}: not valid JSON: {first_line(err)}") from err
    if not isinstance(table, dict):
        raise DataError(f"{folder / name}: not a JSON object")
    return table


def _prompt(prompts: dict[str, Any], subset: str) -> tuple[str, str]:
    """The templates of what stands before and after the document."""
    template = prompts.get(subset)
    if not isinstance(template, str):
        raise DataError(f"{_PROMPTS}: no prompt for {subset!r}")
    before, document, after = template.partition("{context}")
    if not document:
        raise DataError(f"{_PROMPTS}: the prompt for {subset!r} has no {{context}}")
    try:
        (before + after).format(input="")
    except (LookupError, ValueError, AttributeError) as err:
        raise DataError(f"{_PROMPTS}: the prompt for {subset!r} has more than one {{context}} and {{input}}") from err
    return before, after


def _max_new_tokens(lengths: dict[str, Any], subset: str) -> int:
    length = lengths.get(subset)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise DataError(f"{_LENGTHS}: no whole number of 1 or more for {subset!r}")
    return length


def _hub(folder: Path) -> zipfile.Path:
    """The rows as the hub has them: one archive, `data/<subset>.jsonl` inside."""
    from huggingface_hub import hf_hub_download

    hint = f"put LongBench's *.jsonl into {folder}"
    if not is_reachable(HUB_REPOSITORY, "data.zip", "dataset"):
        raise DataError(f"no rows in {folder}, and the hub, which has {HUB_REPOSITORY}, cannot be reached: {hint}")
    try:
        return zipfile.Path(hf_hub_download(HUB_REPOSITORY, "data.zip", repo_type="dataset"), "data/")
    except Exception as err:  # the hub's client raises whatever its network library does
        raise DataError(
            f"no rows in {folder}, and none from the hub's {HUB_REPOSITORY}: {first_line(err)}; {hint}"
        ) from err
