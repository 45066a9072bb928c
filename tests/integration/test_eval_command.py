"""`compresskv eval` and `compresskv report` as their users meet them: on the real model, and on what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import planted
from commands import Result, runner
from compresskv.evaluation.records import Record
from compresskv.evaluation.run_folder import read_run

NEEDLE = ["--tasks", "needle", "--subsets", "single", "--lengths", "400", "--depths", "50"]
REAL = ["eval", *NEEDLE, "--methods", "full,snapkv,knorm", "--budgets", "64"]
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers at once, and text to hide needles in."""
    folder = tmp_path_factory.mktemp("place")
    planted.save(folder / "model")
    planted.write_haystack(folder / "haystack.txt")
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("COMPRESSKV_PEERS_PYTHON", raising=False)
    return runner(monkeypatch, capfd, columns=100)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def records(folder: Path) -> list[Record]:
    found = read_run(folder)[1]
    assert len({record.key for record in found}) == len(found)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run by a new process, and what it printed."""
    folder = tmp_path_factory.mktemp("real") / "runs" / "needle"
    command = [sys.executable, "-m", "compresskv", *REAL, "-o", str(folder), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    return folder, Result(done.returncode, done.stdout, done.stderr)


class TestRealModel:
    """The machine's own cache: the first run on it fetches the model."""

    def test_json_is_all_there_is_on_standard_output(self, made: tuple[Path, Result]) -> None:
        folder, result = made
        assert (result.code, result.err) == (0, "")
        assert json.loads(result.out) == {
            "run": str(folder),
            "configurations": 3,
            "examples": 1,
            "truncated": 0,
            "skipped": 0,
            "prefills": 1,
            "records": 3,
            "peer_failures": [],
        }

    def test_the_records_say_what_each_method_lost(self, made: tuple[Path, Result]) -> None:
        full, snapkv, knorm = records(made[0])
        assert [record.config for record in (full, snapkv, knorm)] == ["full", "snapkv @ 64", "knorm @ 64"]
        assert (full.task, full.example) == ("needle/single", "400-50-0")
        assert 350 < full.prompt_tokens <= 400
        assert full.metrics["score"] == 1
        itemsize = getattr(torch, full.versions["dtype"]).itemsize
        assert full.kv_nbytes == full.prompt_tokens * 30 * 2 * 3 * 64 * itemsize  # layers, K and V, KV heads, size
        for record in (snapkv, knorm):
            assert record.retained_tokens == 64
            assert record.kv_nbytes * record.prompt_tokens == full.kv_nbytes * 64
            assert record.prompt_sha256 == full.prompt_sha256
            assert record.kl_divergence is not None
            assert record.kl_divergence > 0
            assert record.evidence_recall is not None
            assert 0 <= record.evidence_recall < 1
            assert record.versions["model"] == "smollm2-135m"

    def test_the_same_command_again_adds_nothing_and_reads_nothing(
        self, made: tuple[Path, Result], call: Callable[..., Result]
    ) -> None:
        before = (made[0] / "records.jsonl").read_bytes()
        result = call(*REAL, "-o", made[0])
        assert (result.code, result.err) == (0, "")
        assert "1 example (0 cut, 0 skipped), 3 configurations: 0 new records from 0 prefills." in result.out
        assert f"compresskv report {made[0]}" in result.out
        assert (made[0] / "records.jsonl").read_bytes() == before

    def test_its_report_shows_every_configuration(self, made: tuple[Path, Result], call: Callable[..., Result]) -> None:
        pytest.importorskip("matplotlib", reason="figures need the plot extra")
        result = call("report", made[0], "--json")
        assert (result.code, result.err) == (0, "")
        data = json.loads(result.out)
        assert Path(data["file"]).is_file()
        (section,) = data["models"]
        assert section["model"] == "smollm2-135m"
        names = {row["config"] for row in section["overall"]["rows"]}
        assert names == {"full", "snapkv @ 64", "knorm @ 64"}
        table = call("report", made[0])
        assert table.code == 0
        assert all(name in table.out for name in names)


QUICK = ["eval", "--model", "model", "--haystack", "haystack.txt", *NEEDLE, "--methods", "full,snapkv,knorm"]


class TestAddedLater:
    def test_another_budget_and_method_and_nothing_else(
        self, call: Callable[..., Result], place: Path, tmp_path: Path
    ) -> None:
        assert json.loads(call(*QUICK, "--budgets", "64", "-o", tmp_path, "--json").out)["records"] == 3
        more = [*QUICK[:-1], "snapkv,streaming_llm", "--budgets", "64,50%", "-o", tmp_path, "--json"]
        told = json.loads(call(*more).out)
        assert (told["records"], told["prefills"], told["configurations"]) == (3, 1, 5)
        assert [record.config for record in records(tmp_path)] == [
            "full",
            "snapkv @ 64",
            "knorm @ 64",
            "streaming_llm @ 64",
            "snapkv @ 50%",
            "streaming_llm @ 50%",
        ]

    def test_another_option_is_refused_by_name(self, call: Callable[..., Result], tmp_path: Path) -> None:
        call(*QUICK, "-o", tmp_path)
        assert_refused(call(*QUICK, "-o", tmp_path, "--seed", "1"), "--seed 0, not 1", "give another folder")
        moved = [*QUICK, "--model", "/nowhere/model", "-o", tmp_path]  # found out before the model is looked for
        assert_refused(call(*moved, "--seed", "1"), "--seed 0, not 1")
        assert_refused(call(*moved), "--model '/nowhere/model'")
        assert_refused(call(*QUICK, "-o", tmp_path, "--no-answers"), "--answers true, not false")

    def test_a_budget_without_room_is_refused_before_anything_is_measured(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        asked = [*QUICK, "--budgets", "1MB,9B", "--stores", "native,int8", "-o", tmp_path / "run"]
        assert_refused(call(*asked), "--budgets '9B' has no room for one token")
        assert not (tmp_path / "run" / "records.jsonl").exists()

    def test_both_settings(self, call: Callable[..., Result], tmp_path: Path) -> None:
        call(*QUICK, "--budgets", "64", "--settings", "aware,agnostic", "--no-answers", "-o", tmp_path)
        assert [record.config for record in records(tmp_path)] == [
            "full",
            "snapkv @ 64",
            "knorm @ 64",
            "snapkv @ 64 (agnostic)",
            "knorm @ 64 (agnostic)",
        ]

    def test_prompts_that_are_cut_or_skipped_are_counted(self, call: Callable[..., Result], tmp_path: Path) -> None:
        short = [*QUICK, "--budgets", "64", "--max-prompt-tokens", "200"]
        assert "1 example (1 cut, 0 skipped)" in call(*short, "-o", tmp_path / "cut").out
        result = call(*short, "--too-long", "skip", "-o", tmp_path / "skip")
        assert result.code == 0
        assert "0 examples (0 cut, 1 skipped), 3 configurations: 0 new records from 0 prefills." in result.out


class TestSuite:
    """A small one: what is run and said, not what the standard one holds."""

    SMALL: ClassVar = {
        "needle": {"subsets": ("single",), "lengths": (400,), "depths": (20.0, 80.0)},
        "questions": {"subsets": ("facts",), "lengths": (600,)},
    }
    COMMAND = ("eval", "--model", "model", "--haystack", "haystack.txt", "--suite", "standard")
    CHOSEN = ("--methods", "snapkv,knorm", "--budgets", "64")

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("compresskv.evaluation.suite.SUITES", {"standard": self.SMALL})

    def test_one_command_runs_all_tasks_and_shows_a_table_of_each_with_intervals(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        told = json.loads(call(*self.COMMAND, *self.CHOSEN, "-o", tmp_path, "--json").out)
        assert (told["examples"], told["prefills"], told["records"]) == (2 + 5, 2 + 1, 3 * (2 + 5))
        (section,) = told["models"]
        needle, questions = section["groups"]
        assert (needle["name"], questions["name"]) == ("needle", "questions")
        assert {row["config"] for row in needle["rows"]} == {"full", "snapkv @ 64", "knorm @ 64"}
        assert {row["config"] for row in questions["rows"]} == {
            "full",
            "snapkv @ 64 (agnostic)",
            "knorm @ 64 (agnostic)",
        }
        for row in [*needle["rows"], *questions["rows"]]:
            for mean, low, high in (row["score"], row["kl_interval"]):
                assert low <= mean <= high
        again = call(*self.COMMAND, *self.CHOSEN, "-o", tmp_path)
        assert (again.code, again.err) == (0, "")
        assert "7 examples (0 cut, 0 skipped), 5 configurations: 0 new records from 0 prefills." in again.out
        assert re.search(r"^needle: 1 task, 2 cases *$", again.out, re.MULTILINE)
        assert re.search(r"^questions: 1 task, 5 cases *$", again.out, re.MULTILINE)
        rows = [line for line in again.out.splitlines() if line.lstrip().startswith("snapkv @ 64")]
        assert [row.count("[") for row in rows] == [3, 3], "score, difference and KL each have an interval"

    def test_a_report_takes_the_folder_of_a_suite(self, call: Callable[..., Result], tmp_path: Path) -> None:
        call(*self.COMMAND, *self.CHOSEN, "-o", tmp_path)
        assert "mean over 2 tasks" in call("report", tmp_path).out
        assert "### questions/facts" in (tmp_path / "report.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--suite", "standrad"], ["--suite 'standrad'", "did you mean 'standard'"]),
            (["--tasks", "needle"], ["--tasks 'needle' is settled by the suite"]),
            (["--rows", "1::2"], ["--rows"]),
            (["--lengths", "400,500"], ["--lengths '400,500' is settled by the suite"]),
            (["-o", "run"], ["--output 'run' holds a run that is no suite"]),
        ],
    )
    def test_what_a_suite_settles_is_refused_in_one_line(
        self, call: Callable[..., Result], tmp_path: Path, args: list[str], words: list[str]
    ) -> None:
        Path("run").mkdir(exist_ok=True)
        Path("run/run.json").write_text("{}", encoding="utf-8")
        assert_refused(call(*self.COMMAND, *self.CHOSEN, "-o", tmp_path / "suite", *args), *words)
        assert not (tmp_path / "suite").exists()


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line that says what is wrong."""
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"compresskv: [^\n]+\n", result.err), result.err
    for word in words:
        assert word in result.err


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--tasks", "needel"], ["--tasks 'needel'", "did you mean 'needle'"]),
            (
                ["--tasks", ""],
                ["--tasks ''", "choose from babilong, instructions, longbench, needle, questions, ruler"],
            ),
            (["--subsets", "singel"], ["--subsets 'singel'", "did you mean 'single'"]),
            (["--methods", "full,snapvk"], ["--methods 'snapvk'", "did you mean 'snapkv'"]),
            (
                ["--methods", "snapkv[window=3]"],
                ["--methods 'snapkv[window=3]': window=3", "did you mean 'window_size'"],
            ),
            (["--methods", "snapkv[window_size=3"], ["'snapkv[window_size=3'", "NAME[option=value,...]"]),
            (["--methods", "compresskv"], ["no profile of this model", "compresskv profile model"]),
            (["--budgets", "64,abc"], ["--budgets 'abc'"]),
            (["--budgets", "0"], ["--budgets '0'"]),
            (["--budgets", ""], ["--budgets ''"]),
            (["--settings", "agnostc"], ["--settings 'agnostc'", "did you mean 'agnostic'"]),
            (["--too-long", "ship"], ["--too-long 'ship'", "did you mean 'skip'"]),
            (["--max-prompt-tokens", "0"], ["--max-prompt-tokens 0"]),
            (["--max-prompt-tokens", "3"], ["no room for a prompt in 3 tokens"]),
            (["--max-new-tokens", "-1"], ["--max-new-tokens -1"]),
            (["--lengths", "4k"], ["--lengths '4k'"]),
            (["--lengths", "20"], ["--lengths 20"]),
            (["--depths", "101"], ["--depths 101"]),
            (["--haystack", "missing.txt"], ["missing.txt"]),
            (["--peers", "SnapKVPress"], ["the peers' python .venv-peers/bin/python does not exist", "scripts/peers"]),
            (["--peer-budget", "words"], ["--peer-budget 'words' is unknown"]),
            (["--model", "nowhere.gguf"], ["--model 'nowhere.gguf'"]),
            (["--profile", "missing.json", "--methods", "compresskv"], ["--profile 'missing.json'"]),
            (["--output", "file/run"], ["--output 'file/run' cannot be a folder"]),
        ],
        ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
    )
    def test_options_are_refused_in_one_line_and_leave_no_run(
        self,
        call: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        args: list[str],
        words: list[str],
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
        assert_refused(call(*QUICK, "-o", tmp_path / "run", *args), *words)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ([], ["--data: task 'longbench' needs a folder", "dataset2prompt.json"]),
            (["--data", "nowhere"], ["--data 'nowhere': no such folder"]),
            (["--data", "empty"], ["empty: no dataset2prompt.json"]),
            (["--tasks", "babilong", "--data", "empty"], ["empty: no file of any subset, such as 0k/qa1.jsonl"]),
        ],
    )
    @pytest.mark.parametrize("output", [["--json"], []])
    def test_missing_data_is_told_with_what_is_needed_and_does_not_claim_the_folder(
        self, call: Callable[..., Result], tmp_path: Path, args: list[str], words: list[str], output: list[str]
    ) -> None:
        longbench = ["eval", "--model", "model", "--tasks", "longbench", "--methods", "full", *args, *output]
        assert_refused(call(*longbench, "-o", tmp_path / "run"), *words)
        assert not (tmp_path / "run").exists()

    def test_a_report_of_no_run(self, call: Callable[..., Result], tmp_path: Path) -> None:
        assert_refused(call("report", tmp_path), "holds no run")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX")
class TestInterrupt:
    NUM_CASES = 60
    COMMAND: tuple[str, ...] = (*QUICK, "--budgets", "64", "--limit", str(NUM_CASES), "--json")

    def interrupted(self, place: Path, folder: Path) -> tuple[int, bytes, bytes]:
        """Stopped as soon as some records, and some cases, are done."""
        command = [sys.executable, "-m", "compresskv", *self.COMMAND, "-o", str(folder)]
        options: dict[str, Any] = {"cwd": place, "env": environment()}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
            path, end = folder / "records.jsonl", time.monotonic() + 120
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 5):
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def test_ctrl_c_says_what_was_done_and_leaves_a_run_that_goes_on(
        self, place: Path, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        code, out, err = self.interrupted(place, tmp_path / "run")
        assert code == 130
        told = [line for line in err.splitlines() if not line.endswith(b" s)")]  # a slow machine says it is at work
        assert told == [b"compresskv: interrupted"]
        before = records(tmp_path / "run")
        assert len(before) - json.loads(out)["records"] in (0, 1)  # one may be on disk, but not counted yet
        assert 5 <= len(before) < 3 * self.NUM_CASES
        rest = json.loads(call(*self.COMMAND, "-o", tmp_path / "run").out)
        assert rest["records"] == 3 * self.NUM_CASES - len(before)
        assert records(tmp_path / "run")[: len(before)] == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' data files are not beside this checkout")
@pytest.mark.parametrize(
    ("task", "subset"), [("longbench", "hotpotqa"), ("longbench", "samsum"), ("babilong", "qa1-1k")]
)
def test_the_benchmarks_own_files(task: str, subset: str, call: Callable[..., Result], tmp_path: Path) -> None:
    """Through the words tokenizer most of them is unknown, but places and counts are theirs."""
    own = ["eval", "--model", "model", "--tasks", task, "--subsets", subset, "--data", SHARED, "--limit", "2"]
    result = call(*own, "--methods", "snapkv", "--budgets", "5%", "--settings", "agnostic", "-o", tmp_path, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["records"] == 4
    for record in records(tmp_path):
        assert record.task == f"{task}/{subset}"
        assert record.prompt_tokens < planted.CONTEXT_LENGTH
        assert (record.prediction is None, "score" in record.metrics) == (False, True)
