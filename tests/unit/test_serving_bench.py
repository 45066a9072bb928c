"""What `scripts/bench-serving` keeps and shows; that it measures is tested with vLLM, in tests/serving."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import compresskv
from benchmarks.processes import run_part
from benchmarks.serving import __main__ as bench
from benchmarks.serving import figure, gpu
from benchmarks.serving.__main__ import app
from benchmarks.serving.environment import server_environment
from benchmarks.serving.figure import draw_loads
from benchmarks.serving.load import Load
from benchmarks.serving.results import Results, source_digest
from benchmarks.serving.tables import tables
from compresskv.errors import ConfigError
from compresskv.system.drawing import save_figure

SETTINGS = {"model": "m", "prefix_caching": True}


def load(
    budget: int | None, tokens_per_s: float, *, pool: int = 3, number: int = 1, run: str = "first"
) -> dict[str, Any]:
    size = {"kind": "load", "length": 1000, "pool": pool, "num_requests": 12, "new_tokens": 120}
    names = ("requests_per_s", "first_token_s", "mean_running", "max_running", "num_preemptions")
    figures = {"tokens_per_s": tokens_per_s, **dict.fromkeys(names, 2.0)}
    return {**size, "budget": budget, "round": number, "run": run, **figures}


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "rows.jsonl"
    first = Results(path, SETTINGS)
    key = {"kind": "load", "pool": 3, "budget": None}
    assert not first.has(key)
    first.add(key, {"wall_s": 1.0})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "load", "po')  # a kill cut it short
    second = Results(path, SETTINGS)
    assert second.has(key)
    assert not second.has(key | {"budget": 64})
    second.add(key | {"budget": 64}, {"wall_s": 2.0})
    third = Results(path, None)
    assert [row["wall_s"] for row in third.rows] == [1.0, 2.0]
    assert len({row["run"] for row in third.rows}) == 2
    assert third.settings == SETTINGS


def test_rows_of_other_settings_are_not_mixed_with_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Results(path, SETTINGS).add({"kind": "load"}, {})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="holds rows with prefix_caching=True, not prefix_caching=False"):
        Results(path, SETTINGS | {"prefix_caching": False})
    assert path.read_bytes() == before
    (tmp_path / "other.jsonl").write_text('{"kind": "load"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="does not begin with the settings"):
        Results(tmp_path / "other.jsonl", SETTINGS)
    with pytest.raises(ConfigError, match="no such file"):
        Results(tmp_path / "absent.jsonl", None)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_pool_holds_whole_requests() -> None:
    assert Load(1000, 3, 12, 120).num_blocks == 27
    assert Load(1025, 3, 12, 128).num_blocks == 30


def shown(rows: list[dict[str, Any]]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for table in tables(rows):
            console.print(table)
    return capture.get()


def test_loads_stand_beside_plain_vllm_of_their_own_round() -> None:
    rows = [load(None, 100.0), load(120, 190.0), load(None, 50.0, number=2), load(120, 100.0, number=2)]
    text = shown([*rows, load(120, 70.0, pool=6)])
    plain, cut = [line for line in text.splitlines() if "1,000" in line][:2]
    assert [cell.strip() for cell in plain.split("|")][4:6] == ["plain vLLM", "2"]
    assert "1.95 (1.90 to 2.00)" in cut
    assert " 145 " in cut


def test_runs_are_not_compared_with_each_other() -> None:
    """A machine changes between them: the ratio is that of the plain vLLM which was measured in the same run."""
    rows = [load(None, 100.0), load(64, 300.0), load(None, 50.0, run="second"), load(120, 100.0, run="second")]
    rows.append(load(256, 70.0, run="third"))
    cut = {
        line.split("|")[4].strip(): line.split("|")[10].strip() for line in shown(rows).splitlines() if "1,0" in line
    }
    assert cut == {"plain vLLM": "", "budget 64": "3.00", "budget 120": "2.00", "budget 256": ""}


def test_plain_vllm_is_measured_again_beside_what_is_missing(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl", SETTINGS)
    rounds = [[{"round": number, "budget": budget} for budget in (None, 64, 120)] for number in (1, 2, 3)]
    assert results.missing(rounds) == [key for keys in rounds for key in keys]
    for key in (*rounds[0], *rounds[1][:2]):
        results.add(key, {})
    assert results.missing(rounds) == [rounds[1][0], rounds[1][2], *rounds[2]]
    assert results.missing([[*rounds[0], {"round": 1, "budget": 256}]]) == [rounds[0][0], {"round": 1, "budget": 256}]
    assert results.missing([[{"round": 4, "budget": None}]]) == [{"round": 4, "budget": None}]
    assert not results.missing(rounds[:1])


def test_changed_code_is_another_files_settings(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    code = package / "inner" / "code.py"
    code.write_text("a = 1\n", encoding="utf-8")
    first = source_digest(package)
    (package / "notes.txt").touch()
    assert source_digest(package) == first
    code.write_text("a = 2\n", encoding="utf-8")
    second = source_digest(package)
    code.rename(package / "code.py")
    assert len({first, second, source_digest(package)}) == 3


def test_the_settings_of_a_run_name_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "installed_version", lambda: "0.32.0+cpu")
    source = bench.common_settings("m", "auto", prefix_caching=True)["source"]
    assert source == source_digest(Path(str(compresskv.__file__)).parent)


def test_exported_settings_are_not_the_compared_servers() -> None:
    exported = {"PATH": "p", "VLLM_PLUGINS": "other"}
    environ = exported | dict.fromkeys(("COMPRESSKV_BUDGET", "COMPRESSKV_METHOD", "COMPRESSKV_PROFILE"), "9")
    common = exported | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": "other,compresskv"}
    assert server_environment(environ, compressed=False) == common
    assert server_environment(environ, compressed=True) == common | {"COMPRESSKV_BUDGET": "1.0"}


def test_one_request_alone_and_needles() -> None:
    parts = {
        "plain": {"prefill_s": 8.0, "eviction_s": 0.0, "decode_ms": 24.0},
        "cut": {"prefill_s": 8.0, "eviction_s": 0.16, "decode_ms": 13.0},
        "short": {"prefill_s": 0.1, "eviction_s": 0.0, "decode_ms": 12.5},
    }
    single = {"kind": "single", "length": 7680, "budget": 256, "round": 1, **parts}
    text = shown([single])
    assert "0.16 (2.0%)" in text
    assert "1.92" in text
    assert "1.04" in text
    needles = [
        {"kind": "quality", "length": 1024, "budget": b, "answered": s} for b, s in ((None, 1), (128, 0), (128, 1))
    ]
    assert "1 of 2" in shown(needles)


def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(figure, "save_figure", lambda *drawn: figures.append(drawn[0]) or save_figure(*drawn))
    rows = [load(budget, 100.0, pool=pool) for budget in (None, 64) for pool in (3, 6)]
    draw_loads(rows, tmp_path / "loads.png")
    assert (tmp_path / "loads.png").stat().st_size > 10_000
    (drawn,) = figures
    titles = ["requests per second", "seconds to the first token, mean", "requests running, mean", "tokens per second"]
    assert [axes.get_title() for axes in drawn.axes] == titles
    for axes, height in zip(drawn.axes, (2.0, 2.0, 2.0, 100.0), strict=True):
        assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == dict.fromkeys(
            ("plain vLLM", "budget 64"), [height] * 2
        )
    with pytest.raises(ConfigError, match="holds no loads"):
        draw_loads([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["load", "--pools", "1,3"], "--pools 1,3: a pool of one request"),
        (["load", "--budgets", ""], "--budgets='' names no number"),
        (["single", "--lengths", "long"], "--lengths='long' is not a list of numbers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_refused_before_a_file_is_made(
    arguments: list[str], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    error = CliRunner().invoke(app, [*arguments, "-o", str(path)]).exception
    assert isinstance(error, ConfigError)
    assert line in str(error)
    assert not path.exists()


def test_a_part_that_fails_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that takes too long. That parts measure is tested with vLLM."""
    monkeypatch.setattr(bench, "installed_version", lambda: "0.32.0")
    found = CliRunner().invoke(gpu.app, ["check", "-o", str(tmp_path / "rows.jsonl"), "--pools", "0", "--limit", "0"])
    assert found.exit_code == 1
    rows = Results(tmp_path / "rows.jsonl", None).rows
    assert [row["kind"] for row in rows] == ["starts", "tokens", "tokens", "tokens", "load", "load"]
    assert {row["failed"] for row in rows} == {"no answer in 0 s"}
    failed = run_part("benchmarks.serving.gpu", {"kind": "nothing"}, 60)
    assert failed["failed"] == "exit code 1"
    assert failed["log"].splitlines()[-1] == "KeyError: 'nothing'"
