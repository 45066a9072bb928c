"""`compresskv profile` and its subcommands: on a planted model, killed and started again, and on the embedded one."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import planted
import tiny
from commands import Result, runner
from compresskv.evaluation.run_folder import read_run
from compresskv.methods.blend import Blend
from compresskv.models.embedded import ensure_embedded
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import load
from compresskv.profiles import store
from compresskv.profiles.profile import Profile, read_profile

QUESTION = "What of amber?"
ANSWER = "amber1 amber2 amber3 amber4 amber5 amber6"
FIGURES = "figures: figures/head_scores.png, figures/layer_budgets.png\n"
SMALL = ["--lengths", "256", "--depths", "20,70"]
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="the 'plot' extra is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, needles and text that it knows."""
    folder = tmp_path_factory.mktemp("place")
    planted.save(folder / "model")
    planted.write_needles(folder / "needles.json")
    planted.write_haystack(folder / "haystack.txt")
    (folder / "doc.txt").write_text(" ".join(planted.haystack_sentences(40)) + f" {planted.needle('amber')}")
    return folder


@pytest.fixture
def call(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run a command in this process, in the folder of the model, with a cache of the test's own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "none")
    return runner(monkeypatch, capfd, columns=80)


def find(*args: str) -> list[str]:
    return ["profile", "model", "--needles", "needles.json", "--haystack", "haystack.txt", *args]


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line that says what is wrong."""
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"compresskv: [^\n]+\n", result.err), result.err
    for word in words:
        assert word in result.err


class TestFind:
    def test_a_profile_is_written_told_of_and_used(self, call: Callable[..., Result], tmp_path: Path) -> None:
        result = call(*find(*SMALL))
        assert (result.code, result.err) == (0, "")
        path = Path(result.out.splitlines()[0])
        assert path.parent == tmp_path / "cache" / "profiles"
        assert "12 runs counted, 0 failed to answer and left out; computed in float32." in result.out
        assert re.search(r"1 +2 +0 +5\.", result.out)  # rank, layer, head, score
        profile = read_profile(path)
        assert profile.model_id == "model"
        assert set(profile.ranked_heads(profile.semantic_scores)[:3]) == planted.PLANTED

        answer = call("ask", "doc.txt", QUESTION, "--model", "model", "--budget", "128")
        assert (answer.code, answer.out) == (0, f"{ANSWER}\n")

    def test_quick_into_a_file_as_json(self, call: Callable[..., Result], tmp_path: Path) -> None:
        path = tmp_path / "new" / "profile.json"
        result = call(*find("--quick", *SMALL, "--output", str(path), "--json"))
        assert (result.code, result.err) == (0, "")
        data = json.loads(result.out)
        assert data.pop("file") == str(path)
        assert data == json.loads(path.read_text(encoding="utf-8"))
        assert data["provenance"]["settings"]["num_rotations"] == 6
        assert not list((tmp_path / "cache" / "profiles").glob("*.json"))

    def test_a_quick_profile_never_takes_the_place_of_a_full_one(self, call: Callable[..., Result]) -> None:
        quick = Path(call(*find("--quick", *SMALL)).out.splitlines()[0])
        model, _ = load("model", device="cpu")
        assert store.resolve_profile(model) == read_profile(quick)
        full = Path(call(*find(*SMALL)).out.splitlines()[0])
        assert quick != full
        assert store.resolve_profile(model) == read_profile(full)
        call(*find("--quick", *SMALL))
        assert store.resolve_profile(model) == read_profile(full)

    def test_default_lengths_are_those_that_fit_the_model(self, call: Callable[..., Result], tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        assert call(*find("--depths", "50", "-o", str(path))).code == 0
        assert read_profile(path).provenance["settings"]["lengths"] == [1024, 2048]

    def test_the_default_haystack_is_long_enough_for_the_models_whole_context(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        """The planted model knows few of its words; its needles it finds all the same."""
        args = ["profile", "model", "--needles", "needles.json", "--quick", "--lengths", "2048", "--depths", "50"]
        result = call(*args, "-o", str(tmp_path / "profile.json"))
        assert (result.code, result.err) == (0, "")
        assert "6 runs counted, 0 failed" in result.out


class TestShowImportVerify:
    @pytest.fixture
    def file(self, call: Callable[..., Result], tmp_path: Path) -> Path:
        path = tmp_path / "profile.json"
        assert call(*find("--quick", *SMALL, "-o", str(path))).code == 0
        return path

    def test_show_prints_heads_and_budgets_that_add_up(self, call: Callable[..., Result], file: Path) -> None:
        result = call("profile", "show", str(file), "--budget", "100")
        assert (result.code, result.err) == (0, "")
        assert "model: best heads (mean of 12 runs)" in result.out
        layers = re.findall(r"^ +(\d) +[\d, ]+ +0\.\d{4} +(\d+) *$", result.out, re.MULTILINE)
        assert [layer for layer, _ in layers] == ["0", "1", "2"]
        assert sum(int(tokens) for _, tokens in layers) == 300

    def test_show_as_json(self, call: Callable[..., Result], file: Path) -> None:
        data = json.loads(call("profile", "show", str(file), "--budget", "100", "--json").out)
        assert sum(data.pop("layer_budgets").values()) == 300
        assert Profile.from_dict(data) == read_profile(file)

    def test_show_by_the_models_name(self, call: Callable[..., Result]) -> None:
        assert_refused(call("profile", "show", "model"), "'model'", "neither a profile file nor a model")
        call(*find("--quick", *SMALL))
        assert "best heads" in call("profile", "show", "model").out

    @needs_matplotlib
    def test_show_draws_two_figures(self, call: Callable[..., Result], file: Path, tmp_path: Path) -> None:
        result = call("profile", "show", str(file), "--plot", str(tmp_path / "figures"))
        assert result.code == 0
        for name in ("head_scores.png", "layer_budgets.png"):
            assert (tmp_path / "figures" / name).stat().st_size > 1000
            assert name in result.err

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "compresskv-profile", "version": 99}'])
    def test_show_refuses_what_is_no_profile(self, call: Callable[..., Result], tmp_path: Path, content: str) -> None:
        (tmp_path / "bad.json").write_text(content, encoding="utf-8")
        assert_refused(call("profile", "show", str(tmp_path / "bad.json")), "bad.json")

    def test_import_serves_the_model_of_that_name(self, call: Callable[..., Result], tmp_path: Path) -> None:
        heads, layers = tmp_path / "heads.json", tmp_path / "layers.jsonl"
        heads.write_text(json.dumps({"0": [0, 1, 2, 3], "1": [2, 0, 1, 3], "2": [0, 1, 2, 3]}), encoding="utf-8")
        layers.write_text(json.dumps({"one": [0.2, 0.4, 0.4], "avg_score": [0.2, 0.4, 0.4]}), encoding="utf-8")
        args = ["profile", "import", "--heads", str(heads), "--layers", str(layers), "--model"]

        imported = call(*args, "model")
        assert imported.code == 0
        assert imported.err.startswith("It holds ranks within layers: blend and vote")
        assert read_profile(imported.out.strip()).top_heads(1, 2) == [2, 0]
        shown = call("profile", "show", imported.out.strip())
        assert (shown.code, shown.err) == (0, "")
        assert "2, 0, 1, 3" in shown.out
        assert (
            call("ask", "doc.txt", QUESTION, "--model", "model", "--method", "compresskv", "--budget", "128").out
            == f"{ANSWER}\n"
        )

        assert_refused(call(*args, str(tmp_path)), "its shape cannot be read")
        heads.write_text('{"0": [0, 1, 2, 3]}', encoding="utf-8")
        assert_refused(call(*args, "model"), "layers.jsonl")

    def test_import_with_head_scores_serves_methods_that_compare_layers(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        heads, layers, scores = (tmp_path / name for name in ("heads.json", "layers.jsonl", "scores.json"))
        heads.write_text(json.dumps({str(layer): [2, 1, 0, 3] for layer in range(3)}), encoding="utf-8")
        layers.write_text(json.dumps({"avg_score": [0.2, 0.4, 0.4]}), encoding="utf-8")
        means = {f"{layer}-{head}": float((layer, head) in planted.COPYING) for layer in range(3) for head in range(4)}
        scores.write_text(json.dumps({"kind": "traditional", "runs": 7, "mean": means}), encoding="utf-8")
        args = ["profile", "import", "--heads", str(heads), "--layers", str(layers), "--model", "model"]

        ranks_alone = call(*args)
        assert ranks_alone.code == 0
        assert "ranked within each layer only" in call("profile", "show", ranks_alone.out.strip()).out
        asked = ["ask", "doc.txt", QUESTION, "--model", "model", "--method", "vote", "--budget", "128"]
        assert_refused(call(*asked), "ranks within layers", "import head scores")

        imported = call(*args, "--head-scores", str(scores))
        assert (imported.code, imported.err) == (0, "")
        shown = call("profile", "show", imported.out.strip()).out
        assert "best heads (mean of 7 runs)" in shown
        assert re.search(r"1 +1 +2 +1\.000", shown)
        assert call(*asked).out == f"{ANSWER}\n"
        verified = call(*self.verify(imported.out.strip(), "--counts", "2", "--json"))
        rows = {(row["masked"], row["heads"]): row["accuracy"] for row in json.loads(verified.out)}
        assert rows["traditional", 2] == 0
        assert ("semantic", 2) not in rows

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ([], "--heads is missing"),
            (["--heads", "h.json"], "--layers is missing"),
            (["--heads", "h.json", "--layers", "l.json"], "--model is missing"),
            (["--folder", "x"], "--folder 'x' holds files of a --published NAME"),
            (["--published", "GPT-5"], "--published 'GPT-5' is none of Llama-3.1-8B-Instruct,"),
            (["--published", "Qwen2.5-7B-Instruct", "--layers", "l.json"], "--layers 'l.json' cannot be given beside"),
            (["--published", "Qwen2.5-7B-Instruct", "--folder", "x"], "_head_idx.json': No such file"),
        ],
    )
    def test_import_refuses_what_does_not_fit(self, call: Callable[..., Result], args: list[str], words: str) -> None:
        assert_refused(call("profile", "import", *args), words)

    @pytest.fixture
    def run(self, call: Callable[..., Result], file: Path, tmp_path: Path) -> str:
        """An evaluation with automatic budgets, of this model and its profile."""
        run = str(tmp_path / "run")
        given = ["--model", "model", "--profile", str(file), "--haystack", "haystack.txt", "--max-new-tokens", "4"]
        given += [
            "--methods",
            "blend",
            "--no-answers",
            "--lengths",
            "300",
            "--limit",
            "2",
            "--depths",
            "20,40,60,80",
        ]
        budgets = "auto[at_most=60,max_loss=1e-9],auto[max_loss=0.3]"
        evaluated = call("eval", "--tasks", "needle", *given, "--budgets", budgets, "-o", run)
        assert evaluated.code == 0, evaluated.err
        return run

    def test_a_script_tells_what_was_predicted_and_lost(
        self, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        plot = ["--plot", str(tmp_path / "auto.png")] if find_spec("matplotlib") else []
        monkeypatch.setattr(sys, "argv", ["x", run, *plot])
        runpy.run_module("benchmarks.auto", run_name="__main__")
        out = capfd.readouterr().out
        records = [one for one in read_run(Path(run))[1] if one.budget is not None]
        general = Blend.general_loss
        assert general is not None
        assert {one.budget for one in records} == {"auto[max_loss=1e-09,at_most=60]", "auto[max_loss=0.3]"}
        for record in records:
            assert record.uncovered is not None
            assert record.predicted_loss == pytest.approx(general.loss(record.uncovered))
        free = [one for one in records if one.budget == "auto[max_loss=0.3]"]
        within = sum((one.kl_divergence or 0) <= 0.3 for one in free)
        assert f"| blend | model | 0.3 | {len(free)} | {within} (" in out
        assert "| nothing |" in out
        assert not plot or (tmp_path / "auto.png").stat().st_size > 1000

    def test_calibrate_fits_what_evaluations_lost(
        self, call: Callable[..., Result], file: Path, run: str, tmp_path: Path
    ) -> None:
        own = str(tmp_path / "own.json")
        result = call("profile", "calibrate", str(file), run, "--output", own, "--json")
        assert (result.code, result.err) == (0, "")
        (curve,) = json.loads(result.out)["curves"]
        assert curve["method"] == "blend"
        assert curve["points"] >= 20
        assert curve["below"] >= 0.97
        profile = read_profile(own)
        assert profile.loss_curves == {"blend": (curve["scale"], curve["power"])}
        assert replace(profile, loss_curves={}, provenance={}) == replace(read_profile(file), provenance={})
        asked = ["ask", "doc.txt", QUESTION, "--model", "model", "--budget", "auto", "--max-loss", "0.3", "--json"]
        stats = [json.loads(call(*asked, "--profile", path).out)["stats"]["auto"] for path in (str(file), own)]
        assert stats[0] != stats[1]
        expected = profile.loss_curves["blend"][0] * stats[1]["uncovered"] ** profile.loss_curves["blend"][1]
        assert stats[1]["predicted_loss"] == pytest.approx(expected)

        refuse = ["profile", "calibrate", str(file)]
        assert_refused(call(*refuse, str(tmp_path), "-o", own), "holds no run")
        assert_refused(call(*refuse, run, "-o", own, "--level", "1.5"), "--level 1.5")
        assert_refused(call(*refuse, run, "-o", str(tmp_path / "run" / "records.jsonl")), "would replace the run")
        other = tmp_path / "other.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        data["model"]["fingerprint"]["weights"] = "0" * 16
        other.write_text(json.dumps(data), encoding="utf-8")
        assert_refused(call("profile", "calibrate", str(other), run, "-o", own), "runs", "the profile is of")
        records = tmp_path / "run" / "records.jsonl"
        records.write_text("".join(records.read_text(encoding="utf-8").splitlines(keepends=True)[:9]), encoding="utf-8")
        assert_refused(call(*refuse, run, "-o", own), "of 'blend' that lost tokens: 20 are needed")

    def verify(self, *args: str) -> list[str]:
        given = ["--needles", "needles.json", "--haystack", "haystack.txt", "--length", "256", "--documents", "1"]
        return ["profile", "verify", "model", *args, *given]

    def test_verify_as_json(self, call: Callable[..., Result], file: Path) -> None:
        result = call(*self.verify(str(file), "--counts", "2,3", "--json"))
        assert (result.code, result.err) == (0, "")
        assert {row["dtype"] for row in json.loads(result.out)} == {"float32"}
        rows = {(row["masked"], row["heads"]): row["accuracy"] for row in json.loads(result.out)}
        assert rows["none", 0] == 1
        assert rows["semantic", 2] == 1
        assert rows["semantic", 3] == rows["traditional", 2] == 0

    @needs_matplotlib
    def test_verify_prints_a_table_and_draws_it(self, call: Callable[..., Result], file: Path, tmp_path: Path) -> None:
        result = call(*self.verify(str(file), "--counts", "3", "--plot", str(tmp_path)))
        assert result.code == 0
        assert re.search(r"none +0 +4 of 4 +100%", result.out)
        assert re.search(r"semantic +3 +0 of 4 +0%", result.out)
        assert (tmp_path / "verify.png").stat().st_size > 1000

    def test_verify_without_a_profile_is_refused(self, call: Callable[..., Result]) -> None:
        assert_refused(call(*self.verify()), "no profile of this model")

    @pytest.mark.parametrize("counts", ["0", "-5", "13", "five"])
    def test_verify_refuses_counts_that_cannot_be(self, call: Callable[..., Result], file: Path, counts: str) -> None:
        assert_refused(call(*self.verify(str(file), f"--counts={counts}")), "--counts")

    @pytest.mark.parametrize("command", ["show", "verify"])
    def test_a_folder_of_figures_that_cannot_be(
        self, call: Callable[..., Result], file: Path, place: Path, command: str
    ) -> None:
        taken = str(place / "doc.txt")
        args = ["profile", "show", str(file)] if command == "show" else self.verify(str(file))
        assert_refused(call(*args, "--plot", taken), f"--plot {taken!r} cannot be a folder: Not a directory")

    @pytest.mark.parametrize("option", ["--heads", "--layers"])
    def test_import_names_the_file_that_is_missing(
        self, call: Callable[..., Result], tmp_path: Path, option: str
    ) -> None:
        (tmp_path / "heads.json").write_text('{"0": [0, 1]}', encoding="utf-8")
        (tmp_path / "layers.json").write_text('{"a": [1.0]}', encoding="utf-8")
        (tmp_path / f"{option[2:]}.json").unlink()
        paths = {name: str(tmp_path / f"{name[2:]}.json") for name in ("--heads", "--layers")}
        args = [word for pair in paths.items() for word in pair]
        assert_refused(call("profile", "import", *args, "--model", "m"), f"{option} {paths[option]!r}: No such file")


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--lengths", "long"], ["--lengths 'long'"]),
            (["--lengths", "256;512"], ["--lengths '256;512'"]),
            (["--lengths", ""], ["--lengths"]),
            (["--lengths", "100"], ["--lengths 100", "256"]),
            (["--lengths", "512,512"], ["--lengths 512,512", "twice"]),
            (["--depths", "middle"], ["--depths 'middle'"]),
            (["--depths", "50,101"], ["--depths 50.0,101.0"]),
            (["--depths", "nan"], ["--depths nan"]),
            (["--depths=-1"], ["--depths -1"]),
            (["--lengths", "2049"], ["--lengths 2049", "2048"]),
            (["--needles", "missing.json"], ["--needles 'missing.json'", "No such file"]),
            (["--needles", "doc.txt"], ["--needles 'doc.txt'"]),
            (["--haystack", "missing.txt"], ["--haystack 'missing.txt'", "No such file"]),
            (["--haystack", "needles.json", "--lengths", "2048"], ["the haystack has", "2048"]),
            (["--haystack", "model/generation_config.json", "--lengths", "256"], ["the haystack has", "256"]),
            (["--haystack", ".cache"], ["--haystack '.cache'", "No such file"]),
            (["--haystack", "model"], ["--haystack model holds no text"]),
        ],
        ids=lambda value: " ".join(value)[:40],
    )
    def test_options(self, call: Callable[..., Result], args: list[str], words: list[str]) -> None:
        assert_refused(call("profile", "model", *args), *words)

    @pytest.mark.parametrize("output", ["{}", "{}/doc.txt/profile.json"])
    def test_an_unwritable_output_is_found_before_the_model_is_loaded(
        self, call: Callable[..., Result], place: Path, monkeypatch: pytest.MonkeyPatch, output: str
    ) -> None:
        def load(*_: object, **__: object) -> None:
            raise AssertionError("the model is loaded already")

        monkeypatch.setattr("compresskv.models.load.load", load)
        assert_refused(call(*find(*SMALL, "--output", output.format(place))), f"--output {output.format(place)!r} ")

    def test_an_unwritable_cache_is_found_before_the_long_work(
        self, call: Callable[..., Result], place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(place / "doc.txt"))
        assert_refused(call(*find(*SMALL)), "cannot keep finished runs")

    def test_an_unwritable_log_is_found_before_the_long_work(self, call: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "cache" / "profiles").mkdir(parents=True)
        (tmp_path / "cache" / "profiles" / "runs").write_text("", encoding="utf-8")
        assert_refused(call(*find(*SMALL)), "cannot keep finished runs")

    def test_a_model_that_never_retrieves_shows_what_it_answered(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        model, tokenizer = planted.build()
        model.lm_head.weight.data[:, len(tokenizer) :] = 0  # what was retrieved is not said
        model.save_pretrained(tmp_path / "mute")
        tokenizer.save_pretrained(tmp_path / "mute")
        output = tmp_path / "profile.json"
        result = call("profile", str(tmp_path / "mute"), *find(*SMALL, "--output", str(output))[2:])
        assert result.code == 2
        assert result.out == ""
        *table, last = result.err.splitlines()
        assert last == "compresskv: the model retrieved no needle in 12 runs, so its heads cannot be scored"
        assert sum("dunno" in line for line in table) == 12
        assert all(topic in result.err for topic in planted.TOPICS)
        assert not output.exists()
        assert not list((tmp_path / "cache" / "profiles").glob("*.json"))

    def test_a_model_without_grouped_queries(self, call: Callable[..., Result], tmp_path: Path) -> None:
        tiny.build_model("llama_mha").save_pretrained(tmp_path / "mha")
        planted.tokenizer().save_pretrained(tmp_path / "mha")
        result = call("profile", str(tmp_path / "mha"), *find(*SMALL)[2:])
        assert_refused(result, "no grouped-query attention", "'snapkv'")
        assert not list((tmp_path / "cache" / "profiles").glob("*.json"))

    def test_weights_that_are_not_numbers(self, call: Callable[..., Result], tmp_path: Path) -> None:
        model, tokenizer = planted.build()
        model.lm_head.weight.data.fill_(torch.nan)
        model.save_pretrained(tmp_path / "nan")
        tokenizer.save_pretrained(tmp_path / "nan")
        output = tmp_path / "profile.json"
        result = call("profile", str(tmp_path / "nan"), *find(*SMALL, "-o", str(output))[2:])
        assert_refused(result, "NaN")
        assert not output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
class TestKilled:
    ARGS = ("--lengths", "1024,1500", "--depths", "10,50,90")
    NUM_RUNS = 2 * 6 * 3

    def run(self, place: Path, cache: Path, output: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "compresskv", *find(*self.ARGS, "-o", str(output))]
        environment = os.environ | {"COMPRESSKV_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_a_killed_calibration_goes_on_and_ends_as_an_uninterrupted_one(
        self, call: Callable[..., Result], place: Path, tmp_path: Path
    ) -> None:
        runs, output = tmp_path / "killed" / "profiles" / "runs", tmp_path / "resumed.json"
        with self.run(place, tmp_path / "killed", output) as process:
            while sum(log.read_bytes().count(b"\n") for log in runs.glob("*.jsonl")) < 5:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        (log,) = runs.glob("*.jsonl")
        finished = log.read_bytes()
        finished = finished[: finished.rfind(b"\n") + 1]
        assert 5 <= finished.count(b"\n") < self.NUM_RUNS
        assert not output.exists()
        with log.open("ab") as file:
            file.write(b'{"key": ["heads", "1024-9", "am')  # as if it had been killed while it wrote

        with self.run(place, tmp_path / "killed", output) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, b"")
        assert f"{self.NUM_RUNS} runs counted, 0 failed".encode() in out
        assert log.read_bytes().startswith(finished)
        keys = [tuple(json.loads(line)["key"]) for line in log.read_bytes().splitlines()]
        assert len(keys) == len(set(keys))
        assert sum(kind == "heads" for kind, *_ in keys) == self.NUM_RUNS
        assert list(runs.glob("*.jsonl")) == [log]

        whole = tmp_path / "whole.json"
        assert call(*find(*self.ARGS, "-o", str(whole))).code == 0
        assert read_profile(output) == read_profile(whole)


@pytest.mark.slow
def test_the_embedded_model_is_calibrated_shown_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A quick calibration of the real model; what is read is as little as shows the heads."""
    model_folder = ensure_embedded("smollm2-135m")
    (tmp_path / "cache").mkdir()  # without the runs of other calibrations, but with the machine's own model
    (tmp_path / "cache" / model_folder.name).symlink_to(model_folder, target_is_directory=True)

    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    call = runner(monkeypatch, capfd, columns=80)

    def run(*args: str) -> str:
        result = call("profile", *args)
        assert (result.code, result.err.replace(FIGURES, "")) == (0, "")
        return result.out

    run("smollm2-135m", "--quick", "--lengths", "512", "--depths", "30,70", "-o", "profile.json")
    model, _ = load("smollm2-135m", device="cpu")
    profile = store.resolve_profile(model, tmp_path / "profile.json")
    assert profile.fingerprint == fingerprint(model)
    assert (len(profile.layer_indices), len(profile.semantic_scores[0])) == (30, 9)
    assert profile.num_runs >= 6

    # The heads are few, far ahead of the others, and in the layers where a probe found them (ALGORITHM, section 6).
    best = profile.ranked_heads(profile.semantic_scores)[:10]
    assert sum(14 <= layer <= 23 for layer, _ in best) >= 6
    scores = sorted((score for row in profile.semantic_scores for score in row), reverse=True)
    assert scores[9] > 5 * scores[135]

    figures = [] if find_spec("matplotlib") is None else ["--plot", "figures"]
    assert "smollm2-135m: best heads" in run("show", "profile.json", *figures)
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "figures").glob("*.png"))
    assert len(list(tmp_path.glob("figures/*.png"))) == len(figures)

    args = ["--counts", "20", "--length", "512", "--documents", "1", "--json"]
    rows = {row["masked"]: row["accuracy"] for row in json.loads(run("verify", "smollm2-135m", "profile.json", *args))}
    assert set(rows) == {"none", "semantic", "traditional", "random"}
    assert rows["none"] >= 0.5
    assert rows["semantic"] < rows["none"]
    assert rows["semantic"] <= rows["random"]
