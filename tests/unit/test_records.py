"""The records of a run: what was written stays, whatever happened to the process that wrote it."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from compresskv.errors import DataError
from compresskv.evaluation.records import Record
from compresskv.evaluation.run_folder import RecordLog, read_run

CONFIGURATION = {"tasks": ["needle"], "lengths": [1024], "limit": None, "versions": {"torch": "2.13.0"}}
A = Record("needle/single", "1", "snapkv", 128, "aware", "0f" * 8, 1000, 0, 128.0, 2048, 16000)
B = replace(A, budget=0.05, prediction="naïve \u2028 line\n", metrics={"score": 1.0}, meta={"depth": 25.0, "x": [None]})
C = replace(A, example="2", kl_divergence=1e-7, versions={"torch": "2.13.0"}, shared_prefill=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def log_of(folder: Path, *records: Record) -> None:
    with RecordLog(folder, CONFIGURATION) as log:
        for record in records:
            log.add(record)


def records_in(folder: Path) -> list[Record]:
    with RecordLog(folder, CONFIGURATION) as log:
        return log.records()


class TestConfig:
    def test_names_in_tables(self) -> None:
        assert A.config == "snapkv @ 128"
        assert replace(A, method="full", budget=None).config == "full"
        assert replace(A, setting="agnostic").config == "snapkv @ 128 (agnostic)"

    def test_budgets_that_differ_have_names_that_differ(self) -> None:
        budgets = [1, 1.0, 0.05, 1234567, 1234568]
        assert len({replace(A, budget=budget).config for budget in budgets}) == len(budgets)


class TestKept:
    def test_what_was_added_is_there_and_still_there_when_opened_again(self, folder: Path) -> None:
        log_of(folder, A, B)
        with RecordLog(folder, CONFIGURATION) as log:
            assert log.has("needle/single", "1", "snapkv @ 128")
            assert not log.has("needle/single", "2", "snapkv @ 128")
            assert not log.has("needle/multi", "1", "snapkv @ 128")
            log.add(C)
            assert log.records() == [A, B, C]
        assert records_in(folder) == [A, B, C]
        assert read_run(folder) == (CONFIGURATION, [A, B, C])

    def test_a_record_is_on_disk_as_soon_as_it_is_added(self, folder: Path) -> None:
        with RecordLog(folder, CONFIGURATION) as log:
            for number, record in enumerate([A, B, C], start=1):
                log.add(record)
                assert len(read_run(folder)[1]) == number

    def test_a_record_is_never_kept_twice(self, folder: Path) -> None:
        with RecordLog(folder, CONFIGURATION) as log:
            log.add(A)
            with pytest.raises(ValueError, match="already"):
                log.add(replace(A, prediction="another"))
        assert records_in(folder) == [A]

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_what_is_no_number_is_never_written(self, folder: Path, number: float) -> None:
        with RecordLog(folder, CONFIGURATION) as log:
            for bad in (replace(A, kl_divergence=number), replace(A, metrics={"score": number})):
                with pytest.raises(ValueError, match="JSON"):
                    log.add(bad)
            assert not log.has(*A.key)
            log.add(A)
        assert records_in(folder) == [A]

    def test_a_full_disk_leaves_no_half_record(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with RecordLog(folder, CONFIGURATION) as log:
            log.add(A)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                with pytest.raises(DataError, match="No space left") as caught:
                    log.add(B)
            assert "\n" not in str(caught.value)
            log.add(C)
        assert records_in(folder) == [A, C]


class TestKilled:
    @pytest.mark.parametrize("num_lost", [2, 3, 10, 300])
    def test_a_last_record_that_was_cut_short_is_made_again(self, folder: Path, num_lost: int) -> None:
        log_of(folder, A, B)
        path = folder / "records.jsonl"
        path.write_bytes(path.read_bytes()[:-num_lost])
        with pytest.warns(UserWarning, match=r"records\.jsonl: its last line was cut short and is left out"):
            assert read_run(folder)[1] == [A]
        log_of(folder, B, C)
        assert read_run(folder)[1] == [A, B, C]

    def test_a_last_record_without_its_line_end_is_whole(self, folder: Path) -> None:
        """An editor may have taken it."""
        log_of(folder, A, B)
        path = folder / "records.jsonl"
        path.write_bytes(path.read_bytes()[:-1])
        assert read_run(folder)[1] == [A, B]
        log_of(folder, C)
        assert read_run(folder)[1] == [A, B, C]

    @given(st.data())
    def test_whatever_survives_of_the_file_is_the_first_records(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        folder = tmp_path_factory.mktemp("run")
        log_of(folder, A, B, C)
        path = folder / "records.jsonl"
        whole = path.read_bytes()
        size = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:size])
        kept = (whole[:size] + b"\n" if whole[size : size + 1] == b"\n" else whole[:size]).count(b"\n")
        with RecordLog(folder, CONFIGURATION) as log:
            assert log.records() == [A, B, C][:kept]
            for record in [A, B, C][kept:]:
                log.add(record)
        assert path.read_bytes() == (whole if kept < 3 else whole[:size])  # nothing added, nothing changed

    @pytest.mark.parametrize("damage", [b"\0\0\0", b"\xff\xfe", b"{}", b"[1]", b"", b"[" * 100_000, b'{"task": "ne'])
    def test_a_damaged_line_costs_its_own_record_only(self, folder: Path, damage: bytes) -> None:
        log_of(folder, A)
        path = folder / "records.jsonl"
        damaged = path.read_bytes() + damage + b"\n"
        path.write_bytes(damaged)
        records_in(folder)
        assert path.read_bytes() == damaged  # to look at it changes nothing
        if damage:
            with pytest.warns(UserWarning, match=r"1 line of '.*' cannot be read: '.*unreadable-1.jsonl' keeps"):
                log_of(folder, B)
            assert (folder / "records.unreadable-1.jsonl").read_bytes() == damaged
        else:
            log_of(folder, B)
        assert records_in(folder) == [A, B]
        assert read_run(folder)[1] == [A, B]  # a report of the resumed run does not stumble over it

    def test_backups_do_not_replace_one_another(self, folder: Path) -> None:
        log_of(folder, A)
        path = folder / "records.jsonl"
        for number, record in enumerate([B, C], start=1):
            path.write_bytes(path.read_bytes() + b"[1]\n{}\n")
            with pytest.warns(UserWarning, match="2 lines of"):
                log_of(folder, record)
            assert (folder / f"records.unreadable-{number}.jsonl").is_file()
        assert read_run(folder)[1] == [A, B, C]


class TestWhoseRun:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"lengths": [2048]}, "lengths=1024, not 2048"),
            ({"limit": 5}, "limit=none, not 5"),
            ({"seed": 1}, "seed=none, not 1"),
            ({"versions": {"torch": "2.6.0"}}, 'versions.torch="2.13.0", not "2.6.0"'),
            ({"lengths": [1024.0]}, "lengths=1024, not 1024.0"),
            ({"versions": None}, 'versions={"torch": "2.13.0"}, not none'),
            ({"rows": [1, None, 2]}, "rows=none, not 1::2"),
        ],
    )
    def test_another_configuration_is_refused_with_its_option(
        self, folder: Path, changes: dict[str, object], told: str
    ) -> None:
        log_of(folder, A)
        with pytest.raises(DataError) as caught:
            RecordLog(folder, {**CONFIGURATION, **changes})
        assert str(caught.value) == f"output='{folder}' was made with {told}: give another folder"
        assert records_in(folder) == [A]

    def test_the_same_configuration_may_come_in_another_shape(self, folder: Path) -> None:
        log_of(folder, A)
        same = {"lengths": (1024,), "versions": {"torch": "2.13.0"}, "tasks": ("needle",)}
        with RecordLog(folder, same) as log:
            assert log.records() == [A]

    def test_another_process_is_refused_until_the_first_is_done(self, folder: Path) -> None:
        with RecordLog(folder, CONFIGURATION) as log:
            with pytest.raises(DataError, match="in use by another process") as caught:
                RecordLog(folder, CONFIGURATION)
            assert "\n" not in str(caught.value)
            log.add(A)
        assert records_in(folder) == [A]

    def test_a_refused_run_stays_free_for_others(self, folder: Path) -> None:
        log_of(folder)
        with pytest.raises(DataError):
            RecordLog(folder, {})
        assert records_in(folder) == []

    def test_records_without_their_configuration_are_not_taken_over(self, folder: Path) -> None:
        log_of(folder, A)
        (folder / "run.json").unlink()
        with pytest.raises(DataError, match=r"records\.jsonl but no run\.json"):
            RecordLog(folder, CONFIGURATION)

    def test_an_unwritable_place_is_told_in_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(DataError, match=r"^output=.* cannot keep records") as caught:
            RecordLog(tmp_path / "file" / "run", CONFIGURATION)
        assert "\n" not in str(caught.value)


class TestRead:
    @pytest.mark.parametrize(
        ("row", "told"),
        [
            ({}, "field 'task' is missing"),
            ([], "it is a list, not an object"),
            ({**asdict(A), "budget": "128"}, "field 'budget' cannot be used"),
            ({**asdict(A), "prompt_tokens": True}, "field 'prompt_tokens' is true or false, not a whole number"),
            ({**asdict(A), "metrics": {"score": None}}, "field 'metrics[...]' is null, not a number"),
            ({**asdict(A), "prompt_tokens": 0}, "field 'prompt_tokens' is not a whole number >= 1"),
            ({**asdict(A), "nonsense": 1}, "field 'nonsense' is unknown"),
            ({**asdict(A), "kl_divergence": float("nan")}, "NaN is not JSON"),
        ],
    )
    def test_a_malformed_record_is_told_with_file_and_line(self, folder: Path, row: object, told: str) -> None:
        log_of(folder, A)
        path = folder / "records.jsonl"
        path.write_text(path.read_text() + json.dumps(row) + "\n")
        with pytest.raises(DataError) as caught:
            read_run(folder)
        assert f"{path}, line 2: " in str(caught.value)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_record_of_an_earlier_release_is_read(self, folder: Path) -> None:
        """Fields that came later have their defaults, and whole numbers do for others."""
        log_of(folder)
        old = (
            '{"task": "needle/single", "example": "1024-50-0", "method": "snapkv", "budget": 64, "setting": "aware", '
            '"prompt_sha256": "0f0f0f0f0f0f0f0f", "prompt_tokens": 1000, "truncated_tokens": 0, "retained_tokens": 64, '
            '"kv_nbytes": 2048, "kv_nbytes_full": 32000, "prediction": "x", "metrics": {"score": 1}, '
            '"evidence_recall": null, "meta": {"length": 1024, "depth": 50.0}, "versions": {"torch": "2.13.0"}}'
        )
        (folder / "records.jsonl").write_text(old + "\n", encoding="utf-8")
        (record,) = read_run(folder)[1]
        assert (record.config, record.retained_tokens, record.metrics) == ("snapkv @ 64", 64.0, {"score": 1.0})
        assert (type(record.budget), record.shared_prefill, record.seed, record.token_ids) == (int, True, 0, None)

    def test_a_folder_without_a_run_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no run"):
            read_run(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{"])
    def test_a_damaged_configuration_is_told_with_its_file(self, folder: Path, text: str) -> None:
        log_of(folder, A)
        (folder / "run.json").write_text(text)
        for read in (read_run, lambda path: RecordLog(path, CONFIGURATION)):
            with pytest.raises(DataError, match=r"run\.json"):
                read(folder)
