"""Suites: which tasks they run, and where their runs lie."""

from pathlib import Path

import pytest

from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.configurations import parse_budgets
from compresskv.evaluation.suite import BUDGETS, METHODS, SUITES, runs_of, suite_runs
from compresskv.methods.registry import parse_methods

MADE = ["needle", "ruler", "instructions", "questions"]


def folder_with(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).mkdir()
    return place


def test_tasks_that_need_data_are_left_out_without_it(tmp_path: Path) -> None:
    configs, left_out = suite_runs("standard", seed=3)
    assert (list(configs), left_out) == (MADE, ["longbench", "babilong"])
    assert {config.seed for config in configs.values()} == {3}
    configs, left_out = suite_runs("standard", data=folder_with(tmp_path, "babilong"))
    assert (list(configs), left_out) == ([*MADE, "babilong"], ["longbench"])
    assert configs["babilong"].subsets == ("qa1-1k", "qa2-1k", "qa3-1k")


def test_a_suite_runs_every_task_that_there_is(tmp_path: Path) -> None:
    configs, left_out = suite_runs("standard", data=folder_with(tmp_path, "babilong", "longbench"))
    assert list(configs) == list(SUITES["standard"])
    assert not left_out
    assert all(config.tasks == (task,) for task, config in configs.items())
    assert configs["instructions"].max_new_tokens == 96, "five rules are longer than other answers"
    assert len(parse_methods("methods", METHODS)) == 11
    assert parse_budgets(BUDGETS)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no folder longbench and no babilong"):
        suite_runs("standard", data=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        suite_runs("standard", data=tmp_path / "nowhere")


def test_the_runs_of_a_suite_lie_in_its_folder(tmp_path: Path) -> None:
    assert runs_of(tmp_path) == [tmp_path]
    for name in ("ruler", "needle"):
        (folder_with(tmp_path, name) / name / "run.json").write_text("{}")
    assert runs_of(tmp_path) == [tmp_path / "needle", tmp_path / "ruler"]
    (tmp_path / "run.json").write_text("{}")
    assert runs_of(tmp_path) == [tmp_path]
