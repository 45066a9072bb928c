"""The benchmarks by name."""

import importlib
import pkgutil
from typing import TypeVar

import compresskv.evaluation.tasks as own
from compresskv.errors import ConfigError
from compresskv.evaluation.tasks.base import Task
from compresskv.system.check import suggestion

_TASKS: dict[str, type[Task]] = {}
_T = TypeVar("_T", bound=type[Task])


def register_task(task: _T) -> _T:
    """Class decorator: make the task known by its `name`."""
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, type[Task]]:
    """Every task by name, sorted."""
    for module in pkgutil.iter_modules(own.__path__):
        importlib.import_module(f"{own.__name__}.{module.name}")
    return dict(sorted(_TASKS.items()))


def create_task(name: str) -> Task:
    """Build a task.

    Raises:
        ConfigError: unknown, with the nearest known name.
    """
    known = tasks()
    if name not in known:
        raise ConfigError(f"unknown task {name!r}{suggestion(name, list(known))}")
    return known[name]()
