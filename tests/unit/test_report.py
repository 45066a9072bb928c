"""Reports: every number by hand from a few records, and what the page, the figures and the command show of them."""

import itertools
import json
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

pytest.importorskip("scipy", reason="the 'eval' extra is not installed")
pytest.importorskip("matplotlib", reason="the 'plot' extra is not installed")

from commands import runner
from compresskv.cli import terminal
from compresskv.cli.report import EPILOG, group_tables, report
from compresskv.errors import ConfigError, DataError
from compresskv.evaluation import figures
from compresskv.evaluation.records import Record
from compresskv.evaluation.report import digits, heading, write_pages
from compresskv.evaluation.run_folder import RecordLog
from compresskv.evaluation.statistics import macro_interval
from compresskv.evaluation.summary import report_data

VERSIONS = {"model": "org/tiny", "dtype": "float32", "torch": "2.13.0"}


def record(method: str, budget: float | None, example: str, score: float | None, **changes: Any) -> Record:
    base = Record(
        task="needle/single",
        example=example,
        method=method,
        budget=budget,
        setting="aware",
        prompt_sha256=f"hash-{example}",
        prompt_tokens=1000,
        truncated_tokens=0,
        retained_tokens=1000.0 if budget is None else 100.0,
        kv_nbytes=8_000_000,
        kv_nbytes_full=80_000_000,
        prediction=None if score is None else "x",
        metrics={} if score is None else {"score": score},
        versions=VERSIONS,
    )
    return replace(base, **changes)


def run(folder: Path, *records: Record) -> Path:
    with RecordLog(folder, {"tasks": ["needle"]}) as log:
        for one in records:
            log.add(one)
    return folder


FULL = [record("full", None, "1", 1.0), record("full", None, "2", 1.0), record("full", None, "3", 0.5)]
OURS = [record("compresskv", 100, "1", 1.0), record("compresskv", 100, "2", 0.75), record("compresskv", 100, "3", 0.5)]
SNAP = [record("snapkv", 100, "1", 0.5), record("snapkv", 100, "2", 0.25), record("snapkv", 100, "3", 0.0)]
RANDOM = [record("random", 100, "1", 0.0), record("random", 100, "2", 0.25), record("random", 100, "3", 0.25)]
SMALL = [
    record("snapkv", 0.05, "1", 0.25, retained_tokens=50.0, kv_nbytes=4_000_000),
    record("snapkv", 0.05, "2", 0.25, kv_nbytes=4_000_000),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run(tmp_path / "run", *FULL, *SNAP, *RANDOM, *OURS, *SMALL)


def rows_of(folders: list[Path], **options: Any) -> dict[str, dict[str, Any]]:
    (section,) = report_data(folders, **options)["models"]
    return {row["config"]: row for row in section["overall"]["rows"]}


class TestNumbers:
    def test_rows_come_by_budget_then_score(self, folder: Path) -> None:
        expected = ["full", "snapkv @ 5%", "compresskv @ 100", "snapkv @ 100", "random @ 100"]
        assert list(rows_of([folder])) == expected

    def test_scores_are_means_over_cases(self, folder: Path) -> None:
        rows = rows_of([folder])
        assert [rows[name]["score"][0] for name in ("compresskv @ 100", "snapkv @ 100")] == [0.75, 0.25]
        assert rows["full"]["score"][0] == pytest.approx(2.5 / 3)
        _, low, high = rows["compresskv @ 100"]["score"]
        assert 0.5 <= low < 0.75 < high <= 1.0
        assert (rows["full"]["num_cases"], rows["snapkv @ 5%"]["num_cases"]) == (3, 2)

    def test_differences_are_over_the_same_cases(self, folder: Path) -> None:
        rows = rows_of([folder])
        assert rows["snapkv @ 5%"]["from_full"] == {"mean": -0.75, "low": -0.75, "high": -0.75, "num_cases": 2}
        assert rows["compresskv @ 100"]["from_full"]["mean"] == pytest.approx(-0.25 / 3)
        assert rows["full"]["from_full"] is None

    def test_only_our_own_are_compared_with_the_best_of_the_others(self, folder: Path) -> None:
        rows = rows_of([folder])
        ours = rows["compresskv @ 100"]
        assert ours["best_baseline"] == "snapkv @ 100"
        assert ours["from_best_baseline"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_cases": 3}
        assert {row["best_baseline"] for row in rows.values() if row is not ours} == {None}
        assert rows_of([folder], own={"random"})["random @ 100"]["best_baseline"] == "compresskv @ 100"

    def test_options_of_ones_own_leave_a_method_ones_own(self, tmp_path: Path) -> None:
        ours = [replace(one, method="compresskv[pool=3]") for one in OURS]
        row = rows_of([run(tmp_path, *ours, *SNAP)])["compresskv[pool=3] @ 100"]
        assert row["best_baseline"] == "snapkv @ 100"

    def test_the_best_is_marked_where_there_is_a_choice(self, folder: Path) -> None:
        assert [name for name, row in rows_of([folder]).items() if row["best"]] == ["compresskv @ 100"]

    def test_settings_compete_with_their_own_kind_only(self, tmp_path: Path) -> None:
        agnostic = [replace(one, setting="agnostic", metrics={"score": 0.125}) for one in (*SNAP, *OURS)]
        rows = rows_of([run(tmp_path, *FULL, *OURS, *SNAP, *agnostic)])
        assert rows["compresskv @ 100 (agnostic)"]["best_baseline"] == "snapkv @ 100 (agnostic)"
        assert rows["compresskv @ 100 (agnostic)"]["from_best_baseline"]["mean"] == 0
        assert rows["compresskv @ 100 (agnostic)"]["from_full"]["mean"] == pytest.approx(0.125 - 2.5 / 3)
        assert rows["compresskv @ 100"]["best_baseline"] == "snapkv @ 100"

    def test_means_are_over_the_cases_that_have_a_value(self, tmp_path: Path) -> None:
        given = [
            record("snapkv", 100, "1", None, evidence_recall=0.5, kl_divergence=0.2, select_s=0.5, decode_s=1.0),
            record("snapkv", 100, "2", None, evidence_recall=1.0, select_s=0.25, retained_tokens=300.0),
            record("snapkv", 100, "3", None, kv_nbytes=2_000_000),
        ]
        (row,) = rows_of([run(tmp_path, *given)]).values()
        assert row["score"] is None
        assert (row["evidence_recall"], row["kl_divergence"], row["top1_agreement"]) == (0.75, 0.2, None)
        assert row["select_s"] == pytest.approx(0.375)
        assert row["kl_interval"] == [0.2, 0.2, 0.2]
        assert row["retained_tokens"] == pytest.approx((100 + 300 + 100) / 3)
        assert row["retained_fraction"] == pytest.approx((0.1 + 0.3 + 0.1) / 3)
        assert row["kv_nbytes"] == 6_000_000

    def test_questions_on_one_document_are_one_draw(self, tmp_path: Path) -> None:
        def asked(method: str, budget: int | None, scores: Sequence[float], seed: int = 0) -> list[Record]:
            """Five questions a document, of equal scores."""
            return [
                record(method, budget, f"{seed}-{at}-{n}", score, kl_divergence=score, seed=seed, meta={"document": at})
                for at, score in enumerate(scores)
                for n in range(5)
            ]

        one, two = [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
        full = asked("full", None, [1.0] * 4) + asked("full", None, [1.0] * 4, seed=1)
        rows = rows_of([run(tmp_path, *full, *asked("snapkv", 100, one), *asked("snapkv", 100, two, seed=1))])
        row = rows["snapkv @ 100"]
        expected = macro_interval([dict(enumerate([*one, *two]))])
        assert row["score"] == row["kl_interval"] == pytest.approx(list(expected))
        assert [1 + row["from_full"][name] for name in ("mean", "low", "high")] == pytest.approx(list(expected))

    def test_tasks_weigh_alike_and_a_task_that_is_missing_is_told(self, tmp_path: Path) -> None:
        other = [replace(one, task="longbench/qa", metrics={"score": 0.0}) for one in (OURS[0], FULL[0])]
        (section,) = report_data([run(tmp_path, *FULL, *OURS, *SNAP, *other)])["models"]
        rows = {row["config"]: row for row in section["overall"]["rows"]}
        assert rows["compresskv @ 100"]["score"][0] == 0.375
        assert rows["compresskv @ 100"]["from_full"]["mean"] == pytest.approx(-0.25 / 3 / 2)
        assert rows["snapkv @ 100"]["num_tasks"] == 1
        assert rows["compresskv @ 100"]["best_baseline"] is None  # snapkv's mean is over fewer tasks
        assert [table["name"] for table in section["groups"]] == ["longbench", "needle"]
        assert [table["tasks"] for table in section["tasks"]] == [["longbench/qa"], ["needle/single"]]

    def test_prefills_are_counted_once_a_prompt_but_for_those_not_shared(self, tmp_path: Path) -> None:
        peers = [replace(one, method="kvpress:Press", shared_prefill=False) for one in SNAP]
        (section,) = report_data([run(tmp_path, *FULL, *OURS, *peers)])["models"]
        assert (section["num_records"], section["num_prompts"], section["num_prefills"]) == (9, 3, 6)

    def test_heat_maps_hold_means_by_depth_and_length(self, tmp_path: Path) -> None:
        def at(depth: float, length: int, name: str, score: float) -> Record:
            return record("snapkv", 100, name, score, meta={"depth": depth, "length": length})

        given = [at(50, 2048, "1", 1.0), at(50, 2048, "2", 0.5), at(0, 1024, "3", 0.25), at(0, 2048, "4", 0.0)]
        (section,) = report_data([run(tmp_path, *given)])["models"]
        (found,) = section["heat_maps"]
        assert (found["lengths"], found["depths"]) == ([1024, 2048], [0, 50])
        assert found["scores"] == [[0.25, 0.0], [None, 0.75]]

    def test_a_full_cache_in_a_packed_store_takes_no_row_of_maps(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures_saved: list[Any] = []
        monkeypatch.setattr(figures, "save_figure", lambda figure, _: figures_saved.append(figure))
        found = {"task": "needle", "depths": [50], "lengths": [512], "scores": [[1.0]]}
        series = [("full", None), ("full int4", 1.0), ("snapkv", 100), ("snapkv int4", 100)]
        maps = [{**found, "series": name, "budget": budget} for name, budget in series]
        figures._heat_maps(maps, ["snapkv", "snapkv int4"], tmp_path / "map.png")
        assert [axes.get_subplotspec().get_gridspec().nrows for axes in figures_saved[0].axes[:3]] == [1] * 3

    def test_maps_of_other_lengths_share_their_axes(self, tmp_path: Path) -> None:
        from matplotlib.figure import Figure

        def found(lengths: list[int], depths: list[float]) -> dict[str, Any]:
            scores = [[depth / 100 + length / 10_000 for length in lengths] for depth in depths]
            return {"lengths": lengths, "depths": depths, "scores": scores}

        for one in (found([512], [50]), found([1024, 512], [0, 50])):
            axes = Figure().subplots()
            image = figures._heat_map(axes, one, [0, 50], [512, 1024])
            assert [tick.get_text() for tick in axes.get_xticklabels()] == ["512", "1k"]
            shown = image.get_array().filled(-1).tolist()
            for length, depth in itertools.product([512, 1024], [0, 50]):
                known = length in one["lengths"] and depth in one["depths"]
                expected = depth + length / 100 if known else -1
                assert shown[[0, 50].index(depth)][[512, 1024].index(length)] == pytest.approx(expected)


def held(method: str, budget: float | str, score: float, nbytes: Sequence[int], **changes: Any) -> list[Record]:
    """Records of examples 1, 2, ..., in as many bytes each."""
    return [record(method, budget, f"{at}", score, kv_nbytes=one, **changes) for at, one in enumerate(nbytes, 1)]


class TestEqualBytes:
    """Rivals of ours, which holds 3 MB of each prompt."""

    OURS = held("compresskv", "3MB", 0.75, (3_000_000, 3_000_000))

    def best_baseline(self, folder: Path, *rivals: Record) -> str | None:
        found: str | None = rows_of([run(folder, *self.OURS, *rivals)])["compresskv @ 3MB"]["best_baseline"]
        return found

    @pytest.mark.parametrize("method", ["snapkv", "kvpress:SnapKVPress"])
    @pytest.mark.parametrize(
        ("nbytes", "meets"), [(2_700_000, False), (2_750_000, True), (3_250_000, True), (3_350_000, False)]
    )
    def test_another_budget_of_as_many_bytes_is_met(
        self, tmp_path: Path, method: str, nbytes: int, meets: bool
    ) -> None:
        rival = held(method, 128, 0.5, (nbytes, nbytes))
        assert self.best_baseline(tmp_path, *rival) == (f"{method} @ 128" if meets else None)

    @pytest.mark.parametrize(("nbytes", "meets"), [(2_600_000, False), (2_900_000, True), (4_000_000, False)])
    def test_stores_meet_at_as_many_bytes_whatever_their_budgets(
        self, tmp_path: Path, nbytes: int, meets: bool
    ) -> None:
        rival = held("snapkv", 400, 0.5, (nbytes, nbytes), store="int4")
        assert self.best_baseline(tmp_path, *rival) == ("snapkv int4 @ 400" if meets else None)

    def test_another_store_is_not_met_at_the_same_budget_in_other_bytes(self, tmp_path: Path) -> None:
        rival = held("snapkv", "3MB", 0.5, (1_000_000, 1_000_000), store="int4")
        assert self.best_baseline(tmp_path, *rival) is None

    def test_the_best_of_those_with_no_more_bytes_counts(self, tmp_path: Path) -> None:
        """Of three stores at ours, the one that scores most holds too much."""
        rivals = [
            *held("snapkv", 128, 0.25, (3_000_000, 3_000_000)),
            *held("snapkv", 400, 0.5, (3_100_000, 3_100_000), store="int4"),
            *held("snapkv", 800, 1.0, (6_000_000, 6_000_000), store="int4"),
        ]
        row = rows_of([run(tmp_path, *self.OURS, *rivals)])["compresskv @ 3MB"]
        assert row["best_baseline"] == "snapkv int4 @ 400"
        assert row["from_best_baseline"]["mean"] == 0.25
        assert row["best"]

    def test_of_equal_scores_the_one_at_the_same_budget_counts(self, tmp_path: Path) -> None:
        rivals = [
            *held("adakv", 128, 0.5, (3_000_000, 3_000_000)),
            *held("snapkv", "3MB", 0.5, (3_000_000, 3_000_000)),
        ]
        assert self.best_baseline(tmp_path, *rivals) == "snapkv @ 3MB"

    def test_only_one_of_as_many_bytes_is_marked_as_the_best(self, tmp_path: Path) -> None:
        rivals = [
            *held("snapkv", 128, 0.25, (3_000_000, 3_000_000)),
            *held("adakv", 400, 1.0, (3_100_000, 3_100_000), store="int4"),
            *held("adakv", 800, 1.0, (6_000_000, 6_000_000), store="int4"),
        ]
        rows = rows_of([run(tmp_path, *self.OURS, *rivals)])
        assert [name for name, row in rows.items() if row["best"]] == ["adakv int4 @ 400"]

    def test_bytes_are_compared_over_the_cases_that_both_have(self, tmp_path: Path) -> None:
        """A third prompt, which the other has not read, takes ours to twice its bytes."""
        third = record("compresskv", "3MB", "3", 0.75, kv_nbytes=12_000_000)
        rival = held("snapkv", 128, 0.5, (3_000_000, 3_000_000))
        assert self.best_baseline(tmp_path / "a", *rival, third) == "snapkv @ 128"
        elsewhere = replace(rival[0], prompt_sha256="another")
        assert self.best_baseline(tmp_path / "b", elsewhere) is None

    def test_a_press_that_masks_meets_its_own_budget_only(self, tmp_path: Path) -> None:
        """It holds everything at every budget, and is no rival of what holds less, nor of what holds as much."""
        everything = [80_000_000] * 2
        given = [
            *held("compresskv", 0.99, 0.75, everything),
            *held("compresskv", 128, 0.5, (3_000_000, 3_000_000)),
            *held("kvpress:AdaKVPress(SnapKVPress)", 128, 1.0, everything),
            *held("kvpress:AdaKVPress(SnapKVPress)", 64, 0.875, everything),
        ]
        rows = rows_of([run(tmp_path, *given)])
        assert {row["best_baseline"] for row in rows.values()} == {None}
        assert not any(row["best"] for row in rows.values())

    def test_figures_are_over_bytes_where_a_store_is_packed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token in 4 bits is no token in 16."""
        native = held("snapkv", 128, 0.5, (8_000_000, 8_000_000), retained_tokens=125.0)
        packed = held("snapkv", 400, 0.75, (4_000_000, 4_000_000), retained_tokens=400.0, store="int4")
        runs = [run(tmp_path / "native", *native), run(tmp_path / "packed", *packed)]
        assert self.shares(runs[:1], monkeypatch) == {"snapkv": ([12.5], "share of the cache retained, %")}
        both = "share of the cache's bytes, %"
        assert self.shares(runs, monkeypatch) == {"snapkv": ([10.0], both), "snapkv int4": ([5.0], both)}

    def shares(self, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[float], str]]:
        """Of each curve of the score's figure: where its points lie, and what the axis says."""
        drawn: list[Any] = []
        monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure))
        figures.draw(report_data(runs)["models"][0], Path(), "figure")
        (axes,) = drawn[0].axes
        return {line.get_label(): ([*map(float, line.get_xdata())], axes.get_xlabel()) for line in axes.lines}


class TestPooled:
    def test_of_a_case_in_two_runs_the_later_counts(self, tmp_path: Path) -> None:
        first = run(tmp_path / "a", *SNAP)
        second = run(tmp_path / "b", replace(SNAP[2], metrics={"score": 0.75}), record("snapkv", 100, "4", 0.5))
        assert rows_of([first, second])["snapkv @ 100"]["score"][0] == 0.5
        assert rows_of([second, first])["snapkv @ 100"]["score"][0] == 0.3125

    def test_another_prompt_is_another_case(self, tmp_path: Path) -> None:
        first = run(tmp_path / "a", SNAP[0])
        second = run(tmp_path / "b", replace(SNAP[0], prompt_sha256="another seed's", metrics={"score": 1.0}))
        assert rows_of([first, second])["snapkv @ 100"]["num_cases"] == 2

    def test_models_and_dtypes_are_kept_apart(self, tmp_path: Path) -> None:
        other = [replace(one, versions={**VERSIONS, "dtype": "bfloat16"}) for one in SNAP]
        data = report_data([run(tmp_path / "a", *OURS), run(tmp_path / "b", *other)])
        assert [(one["model"], one["dtype"]) for one in data["models"]] == [
            ("org/tiny", "bfloat16"),
            ("org/tiny", "float32"),
        ]
        write_pages(report_data([tmp_path / "a", tmp_path / "b"]), tmp_path / "out")
        names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
        assert names == {"tiny-bfloat16-score.png", "tiny-float32-score.png"}

    def test_prompts_read_exactly_and_fast_are_kept_apart_with_peers_beside_both(self, tmp_path: Path) -> None:
        def read(records: list[Record], prefill: str) -> list[Record]:
            return [replace(one, versions={**VERSIONS, "dtype": "bfloat16", "prefill": prefill}) for one in records]

        peers = [replace(one, method="kvpress:Press", shared_prefill=False) for one in read(SNAP, "exact")]
        runs = [run(tmp_path / "a", *peers, *read(SNAP, "fast")), run(tmp_path / "b", *read(SNAP, "exact"))]
        found = {one["prefill"]: one for one in report_data(runs)["models"]}
        assert sorted(found) == ["exact", "fast"]
        for section in found.values():
            assert {row["method"] for row in section["overall"]["rows"]} == {"snapkv", "kvpress:Press"}
            assert {row["num_cases"] for row in section["overall"]["rows"]} == {3}
        assert [heading(one) for one in found.values()] == ["org/tiny (bfloat16)", "org/tiny (bfloat16, fast prefill)"]

    @pytest.mark.parametrize(("dtype", "prefill"), [("float32", "exact"), ("bfloat16", "unknown")])
    def test_records_that_do_not_note_how_they_were_read(self, tmp_path: Path, dtype: str, prefill: str) -> None:
        old = [replace(one, versions={**VERSIONS, "dtype": dtype}) for one in SNAP]
        (section,) = report_data([run(tmp_path / "a", *old)])["models"]
        assert section["prefill"] == prefill

    def test_own_methods_are_among_those_of_the_runs(self, tmp_path: Path) -> None:
        folder = run(tmp_path, *OURS, *SNAP)
        with pytest.raises(ConfigError, match=r"^own='snapkw' is no method of these runs: did you mean 'snapkv'\?$"):
            report_data([folder], ["snapkw"])
        (section,) = report_data([folder], ["snapkv"])["models"]
        assert {row["method"] for row in section["overall"]["rows"] if row["own"]} == {"snapkv"}

    def test_runs_without_records_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no records yet"):
            report_data([run(tmp_path / "a")])


class TestPage:
    def table(self, page: str) -> list[list[str]]:
        lines = [line for line in page.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line]

    def test_the_table_shows_the_numbers(self, folder: Path) -> None:
        page = write_pages(report_data([folder]), folder / "out").read_text(encoding="utf-8")
        titles, *rows = self.table(page)
        expected = ["configuration", "cases", "score", "vs full", "vs best baseline", "tokens", "retained %", "KV MB"]
        assert titles == expected
        ours = dict(zip(titles, rows[2], strict=True))
        assert ours["configuration"] == "compresskv @ 100"
        assert re.fullmatch(r"\*\*75\.0\*\* \[\d+\.\d, \d+\.\d\]", ours["score"])
        assert ours["vs best baseline"] == "+50.0 [+50.0, +50.0]"
        assert (ours["tokens"], ours["retained %"], ours["KV MB"]) == ("100", "10.0", "8.00")
        assert "Best baselines: snapkv @ 100." in page
        assert "- Records: 14, served by 3 prefills." in page

    def test_columns_are_aligned_in_plain_text(self, folder: Path) -> None:
        page = write_pages(report_data([folder]), folder / "out").read_text(encoding="utf-8")
        lines = [line for line in page.splitlines() if line.startswith("|")]
        assert len({tuple(at for at, letter in enumerate(line) if letter == "|") for line in lines}) == 1
        assert max(map(len, page.splitlines())) < 160

    def test_a_single_case_has_no_interval(self, tmp_path: Path) -> None:
        page = write_pages(report_data([run(tmp_path, SNAP[0])]), tmp_path).read_text(encoding="utf-8")
        assert self.table(page)[1][:3] == ["snapkv @ 100", "1", "50.0"]

    def test_a_bar_in_a_label_does_not_end_its_cell(self, tmp_path: Path) -> None:
        page = write_pages(report_data([run(tmp_path, replace(SNAP[0], method="a|b"))]), tmp_path).read_text(
            encoding="utf-8"
        )
        assert "| a\\|b @ 100 " in page

    def test_each_figure_that_is_named_is_there(self, tmp_path: Path) -> None:
        meta = {"length": 1024, "depth": 50}
        given = [replace(one, meta=meta, evidence_recall=0.5) for one in (*FULL, *OURS, *SNAP, *SMALL)]
        page = write_pages(report_data([run(tmp_path / "run", *given)]), tmp_path / "out")
        figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert figures == [f"figures/tiny-float32-{name}.png" for name in ("score", "fidelity", "needle-single")]
        for figure in figures:
            header = (tmp_path / "out" / figure).read_bytes()[:24]
            assert header[:8] == b"\x89PNG\r\n\x1a\n"
            assert all(300 < int.from_bytes(header[at : at + 4], "big") < 4000 for at in (16, 20))

    def test_the_full_cache_alone_makes_a_page(self, tmp_path: Path) -> None:
        given = [replace(one, meta={"length": 1024, "depth": 50}, kl_divergence=0.0) for one in FULL]
        page = write_pages(report_data([run(tmp_path, *given)]), tmp_path)
        assert self.table(page.read_text(encoding="utf-8"))[1][0] == "full"

    def test_many_methods_and_budgets_draw_without_a_warning(self, tmp_path: Path) -> None:
        methods = ["compresskv", "vote", *(f"kvpress:SomeLongNamed{letter}Press" for letter in "ABCDEFGHIJ")]
        given = [
            record(method, budget, f"{length}-{depth}", 0.5, meta={"length": length, "depth": depth}, kl_divergence=1.0)
            for method, budget, length, depth in product(methods, (0.05, 64, 128), (1000, 2048), (0.0, 100.0))
        ]
        write_pages(report_data([run(tmp_path, *given)]), tmp_path)

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0.000"), (0.0001, "<0.001"), (0.0123, "0.012"), (3.6567, "3.66"), (14.66, "14.7"), (1234.5, "1,234")],
    )
    def test_digits(self, value: float, text: str) -> None:
        assert digits(value) == text

    def test_without_matplotlib_the_extra_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ConfigError, match=r"compresskv\[plot\]") as caught:
            write_pages(report_data([folder]), folder / "out")
        assert "\n" not in str(caught.value)
        assert not (folder / "out").exists()

    def test_a_page_that_cannot_be_written_is_told_in_one_line(self, folder: Path) -> None:
        (folder / "out" / "report.md").mkdir(parents=True)
        with pytest.raises(DataError, match="cannot write") as caught:
            write_pages(report_data([folder]), folder / "out")
        assert "\n" not in str(caught.value)


class TestCommand:
    def test_it_prints_the_overall_table_and_where_the_page_is(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(terminal.out, "_width", 100)
        report([folder])
        shown = capsys.readouterr()
        assert re.search(r"compresskv @ 100 +75\.0.*-8\.3 +\+50\.0 +100 +10\.0 +8\.00", shown.out)
        assert max(map(len, shown.out.splitlines())) <= 100
        assert shown.err.replace("\n", "") == f"report: {folder / 'report.md'}"
        assert (folder / "report.md").is_file()

    def test_tables_of_benchmarks_say_tokens_and_bytes(self, folder: Path) -> None:
        (section,) = report_data([folder])["models"]
        (table,) = group_tables(section)
        assert [str(column.header) for column in table.columns][-2:] == ["tokens", "KV MB"]
        assert ["100", "8.00"] in [
            list(row) for row in zip(*(column.cells for column in table.columns[-2:]), strict=True)
        ]

    def test_json_is_all_there_is_on_standard_output(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report([folder], output=folder / "out", own="snapkv", as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert shown["file"] == str(folder / "out" / "report.md")
        assert shown["models"] == report_data([folder], {"snapkv"})["models"]

    @pytest.mark.filterwarnings("default::UserWarning")
    def test_a_last_line_that_was_cut_short_is_told_in_one_line(
        self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = folder / "records.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        result = runner(monkeypatch, capfd, 100)("report", folder)
        assert result.code == 0
        first, *rest = result.err.splitlines()
        assert first == f"compresskv: {path}: its last line was cut short and is left out"
        assert len(rest) == 1
        assert path.read_bytes() == whole[:-20]

    def test_several_runs_have_a_folder_of_their_own(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        report([folder, run(tmp_path / "two", *SNAP)])
        assert (tmp_path / "report" / "report.md").is_file()

    def test_its_help_ends_with_examples(self) -> None:
        assert EPILOG.startswith("\b\nExamples:\n  compresskv report ")


def test_where_stores_differ_a_colour_is_a_store_and_a_line_a_method() -> None:
    rows = [
        {"series": f"{method} {store}", "method": method, "store": store, "own": method == "blend"}
        for method in ("adakv", "blend")
        for store in ("int4", "native")
    ]
    styles = figures._styles(rows)
    assert list(styles) == ["blend native", "blend int4", "adakv native", "adakv int4"]
    for one, other in itertools.combinations(styles, 2):
        (method, store), (other_method, other_store) = one.split(), other.split()
        assert (styles[one]["linestyle"] == styles[other]["linestyle"]) == (method == other_method)
        assert (styles[one]["color"] == styles[other]["color"]) == (store == other_store)
        assert styles[one]["marker"] != styles[other]["marker"]


def test_equal_curves_can_be_told_apart() -> None:
    """Each is wider than those drawn over it."""
    from matplotlib.figure import Figure

    same = {"own": False, "store": "native", "score": [40.0], "retained_fraction": 0.1, "num_tasks": 1}
    rows = [{"series": name, "method": name, **same} for name in ("adakv", "cake", "snapkv")]
    rows[1]["score"] = [50.0]
    lines = figures._panel(Figure().subplots(), {"rows": rows, "tasks": ["needle"]}, "score", figures._styles(rows))
    widths = {name: line.get_linewidth() for name, line in lines.items()}
    assert widths["adakv"] > widths["snapkv"] == widths["cake"]
    assert lines["adakv"].get_zorder() <= lines["snapkv"].get_zorder()
