"""Suites: runs of several tasks that are judged together, with settings that do not change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskv.errors import ConfigError
from compresskv.evaluation.run_options import RunOptions
from compresskv.evaluation.tasks.registry import create_task
from compresskv.system.paths import exists, is_folder

METHODS = "full,blend,vote,compresskv,snapkv,adakv,cake,streaming_llm,forecast,kvzip,keydiff"
"""Ten methods beside the full cache: those that see the question, then those that need not."""
BUDGETS = "128"

_MAX_NEW_TOKENS = 48  # answers come first; what follows them says nothing and costs the most
_DATA = {"limit": 2, "max_prompt_tokens": 1536}
SUITES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "standard": {
        "needle": {
            "subsets": ("single", "paraphrase", "multi"),
            "lengths": (1024, 2048),
            "depths": (10.0, 50.0, 90.0),
            "limit": 2,
        },
        "ruler": {"lengths": (1536,), "limit": 3},
        "instructions": {"lengths": (1024,), "limit": 6, "max_new_tokens": 96},
        "questions": {"lengths": (1024,), "limit": 3},
        "longbench": _DATA,
        "babilong": {**_DATA, "subsets": ("qa1-1k", "qa2-1k", "qa3-1k"), "limit": 5},
    }
}
"""Suite -> task -> options of `RunOptions`. The folder of a suite holds a run for each task."""


def suite_runs(suite: str, **given: Any) -> tuple[dict[str, RunOptions], list[str]]:
    """What a suite runs, by task.

    Args:
        given: options of `RunOptions` that a suite leaves open: data, haystack, seed and how prompts are read.
    Returns: (the runs, tasks that are left out, since no data is given for them).
    Raises:
        ConfigError, DataError: `data` holds none of the tasks' data, or as for `RunOptions`.
    """
    data: Path | None = given.get("data")
    needing = [task for task in SUITES[suite] if create_task(task).needs]
    missing = [task for task in needing if data is None or not is_folder(data / task)]
    if data is not None and is_folder(data) and missing == needing:
        raise ConfigError(f"holds no folder {' and no '.join(needing)}", option="data", value=str(data))
    shared = {"max_new_tokens": _MAX_NEW_TOKENS, **given}
    runs = {
        task: RunOptions(**{**shared, **options, "tasks": (task,)})
        for task, options in SUITES[suite].items()
        if task not in missing or (data is not None and not is_folder(data))  # a mistyped folder is told by the first
    }
    return runs, [task for task in missing if task not in runs]


def runs_of(folder: Path) -> list[Path]:
    """The runs in the folder of a suite; of any other folder, itself."""
    if exists(folder / "run.json"):
        return [folder]
    inner = sorted(path.parent for path in folder.glob("*/run.json")) if is_folder(folder) else []
    return inner or [folder]
