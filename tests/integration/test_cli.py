"""The command line as its users meet it: exit codes, what goes to which stream, one line for what is wrong.

New processes are started where that is what is tested. Importing torch takes each of them seconds, so the many inputs
that only differ in their message run the same entry point in this process.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import compresskv
import planted
from commands import Result, runner
from compresskv.bench.geometry import random_centres, random_weights
from compresskv.methods import registry
from compresskv.models.fingerprint import fingerprint
from compresskv.plans.plan import read_plan
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import default_path, write_profile

QUESTION = "What of amber?"
ANSWER = "amber1 amber2 amber3 amber4 amber5 amber6"
METHODS = list(registry.methods())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its profile in the user's cache, and documents."""
    folder = tmp_path_factory.mktemp("place")
    planted.save(folder / "model")
    sentences = planted.haystack_sentences(60)
    sentences.insert(30, planted.needle("amber"))
    (folder / "doc.txt").write_text(" ".join(sentences), encoding="utf-8")
    (folder / "long.txt").write_text(
        " ".join([*planted.haystack_sentences(), planted.needle("amber")]), encoding="utf-8"
    )
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "binary.pdf").write_bytes(b"%PDF-1.7\n\0\x01\x02")
    (folder / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKV_CACHE", str(folder / "cache"))
        write_profile(planted_profile(), default_path(planted_profile().fingerprint))
    return folder


def planted_profile() -> Profile:
    scores = [[0.0] * planted.NUM_HEADS for _ in range(planted.NUM_LAYERS)]
    for rank, (layer, head) in enumerate([planted.WIDE, *planted.COPYING]):
        scores[layer][head] = 6.0 - rank
    return Profile(
        model_id="planted",
        fingerprint=fingerprint(planted.model()),
        layer_indices=(0, 1, 2),
        semantic_scores=tuple(map(tuple, scores)),
        traditional_scores=None,
        num_runs=1,
        layer_errors_by_set={},
        layer_errors=(0.2, 0.4, 0.4),
        replay_weights=tuple(random_weights(planted.model(), layer) for layer in range(planted.NUM_LAYERS)),
        query_centres=tuple(random_centres(planted.model(), layer) for layer in range(planted.NUM_LAYERS)),
    )


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process, in the folder of documents."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(place / "cache"))
    return runner(monkeypatch, capfd, columns=80)


@pytest.fixture
def start(place: Path) -> Callable[..., Result]:
    """Run a command in a process of its own."""

    def run(*args: str, **options: Any) -> Result:
        command = [sys.executable, "-m", "compresskv", *args]
        options = {"cwd": place, "env": environment(place), "stdin": subprocess.DEVNULL, **options}
        done = subprocess.run(command, capture_output=True, timeout=120, check=False, **options)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"COMPRESSKV_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line that says what is wrong."""
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"compresskv: [^\n]+\n", result.err), result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


ASK = ["ask", "doc.txt", QUESTION, "--model", "model"]


class TestHelp:
    HEAVY = ("torch", "transformers", "numpy", "matplotlib", "safetensors")

    def imported(self, *args: str) -> tuple[str, list[str]]:
        """Standard output, and which heavy packages the command imported."""
        code = f"""
import sys
from compresskv.cli import main
sys.argv = ["compresskv", *{list(args)!r}]
try:
    main()
except SystemExit as ended:
    assert ended.code in (0, 2), ended.code
print(*sorted(set({self.HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, done.stderr.split()

    def test_a_new_process_shows_help_with_examples(self, start: Callable[..., Result]) -> None:
        result = start("--help")
        assert (result.code, result.err) == (0, "")
        for word in ("ask", "methods", "models", "profile", "--version", "Examples:"):
            assert word in result.out

    def test_version(self, start: Callable[..., Result]) -> None:
        assert start("--version") == (0, f"compresskv {compresskv.__version__}\n", "")

    @pytest.mark.parametrize(
        "args",
        [
            ["--help"],
            ["--version"],
            ["ask", "-h"],
            ["profile", "--help"],
            ["profile", "find", "--help"],
            ["methods", "-h"],
            ["bench", "--help"],
            ["methods"],
            ["methods", "--json"],
            ["models"],
            ["profile", "show", "smollm2-135m"],
        ],
        ids=" ".join,
    )
    def test_is_quick_since_nothing_heavy_is_imported(self, args: list[str]) -> None:
        out, heavy = self.imported(*args)
        assert out
        assert heavy == []

    def test_no_command_is_help(self, call: Callable[..., Result]) -> None:
        result = call()
        assert "Usage:" in result.out + result.err
        assert "ask" in result.out + result.err


class TestCatalogue:
    def test_methods(self, call: Callable[..., Result]) -> None:
        result = call("methods")
        assert (result.code, result.err) == (0, "")
        lines = result.out.splitlines()
        assert max(map(len, lines)) <= 80
        assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in METHODS] == METHODS

    def test_names_of_options_are_never_broken(self, call: Callable[..., Result]) -> None:
        words = call("methods").out.replace(",", " ").split()
        for row in json.loads(call("methods", "--json").out):
            for name, value in row["options"].items():
                assert f"{name}={value}" in words

    def test_methods_as_json(self, call: Callable[..., Result]) -> None:
        result = call("methods", "--json")
        assert (result.code, result.err) == (0, "")
        rows = json.loads(result.out)
        assert [row["name"] for row in rows] == METHODS
        for row in rows:
            assert set(row) == {"name", "summary", "source", "needs_profile", "options"}
            assert row["needs_profile"] == registry.methods()[row["name"]].needs_profile
            registry.create(row["name"], **row["options"])

    @pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
    def test_a_reader_that_goes_away_is_no_traceback(self, place: Path) -> None:
        command = [sys.executable, "-m", "compresskv", "models", "--json"]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            command, cwd=place, env=environment(place), stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
        os.close(writer)
        assert done.returncode != 0
        assert b"Traceback" not in done.stderr

    def test_models(self, call: Callable[..., Result]) -> None:
        result = call("models")
        assert (result.code, result.err) == (0, "")
        assert "smollm2-135m" in result.out
        assert ".gguf" in result.out

    def test_models_as_json(self, call: Callable[..., Result]) -> None:
        (row,) = json.loads(call("models", "--json").out)
        assert (row["name"], row["context_length"], row["downloaded"]) == ("smollm2-135m", 8192, False)


class TestAsk:
    def test_the_answer_goes_to_standard_output_and_what_it_cost_to_standard_error(
        self, start: Callable[..., Result]
    ) -> None:
        """With all defaults but the model: the user's own profile is found."""
        result = start(*ASK)
        assert (result.code, result.out) == (0, f"{ANSWER}\n")
        assert re.fullmatch(
            r"\[blend: \d+ prompt tokens, 256 kept per layer \(.*%\); KV cache .* MB; first token .*\]\n",
            result.err,
        )

    def test_a_document_from_standard_input(self, place: Path, start: Callable[..., Result]) -> None:
        with (place / "doc.txt").open("rb") as file:
            result = start("ask", "-", QUESTION, "--model", "model", "--method", "full", "--json", stdin=file)
        assert (result.code, result.err) == (0, "")
        assert json.loads(result.out)["answer"] == ANSWER

    @pytest.mark.parametrize("method", METHODS)
    def test_json_and_nothing_else(self, call: Callable[..., Result], method: str) -> None:
        result = call(*ASK, "--method", method, "--budget", "100", "--max-new-tokens", "5", "--json")
        assert (result.code, result.err) == (0, "")
        data = json.loads(result.out)
        assert set(data) == {"model", "answer", "token_ids", "stats"}
        assert data["model"] == "model"
        stats = data["stats"]
        assert set(stats) == {
            "method",
            "budget",
            "store",
            "prompt_tokens",
            "truncated_tokens",
            "generated_tokens",
            "cut_off",
            "retained_per_layer",
            "retained_fraction",
            "kv_nbytes_full",
            "kv_nbytes",
            "prefill_s",
            "time_to_first_token_s",
            "decode_s",
            "decode_tokens_per_s",
            "compiled_tokens",
            "compile_s",
            "not_compiled",
            "peak_memory_nbytes",
            "dtype",
            "auto",
            "chunks",
            "decode",
            "candidates",
            "budget_note",
        }
        assert [stats[name] for name in ("auto", "chunks", "decode", "candidates", "budget_note")] == [None] * 5
        assert stats["compiled_tokens"] == 0
        num_tokens, retained = stats["prompt_tokens"], stats["retained_per_layer"]
        asked = None if method == "full" else 100
        assert (stats["method"], stats["budget"], stats["truncated_tokens"]) == (method, asked, 0)
        assert sum(retained) == 3 * (num_tokens if method == "full" else 100)
        assert stats["retained_fraction"] == pytest.approx(sum(retained) / (3 * num_tokens))
        nbytes = 2 * planted.NUM_KV_HEADS * 64 * 4  # of one token in one layer: keys and values, float32
        assert stats["kv_nbytes_full"] == 3 * num_tokens * nbytes
        assert stats["kv_nbytes"] == sum(retained) * nbytes
        assert stats["generated_tokens"] == len(data["token_ids"]) <= 5
        assert 0 < stats["prefill_s"] <= stats["time_to_first_token_s"]
        assert stats["peak_memory_nbytes"] > 10_000_000

    def test_a_comparison_has_one_row_for_each_method_the_first_included(self, call: Callable[..., Result]) -> None:
        result = call(*ASK, "--method", "full", "--compare", "snapkv, streaming_llm,full,compresskv", "--budget", "15%")
        assert (result.code, result.err) == (0, "")
        assert table_rows(result.out) == ["full", "snapkv", "streaming_llm", "compresskv"]
        assert max(map(len, result.out.splitlines())) <= 80

    def test_an_answer_that_was_longer_is_told_of(self, call: Callable[..., Result]) -> None:
        few = ["--method", "full", "--max-new-tokens", "2"]
        told = "the answer ends at --max-new-tokens 2]\n"
        assert call(*ASK, *few).err.endswith(f"\n[{told}")
        assert call(*ASK, *few, "--compare", "snapkv").err == f"[full, snapkv: {told}"
        page = call("explain", *ASK[1:], *few, "--json")
        assert page.err.endswith(f"\n[full: {told}")
        assert json.loads(page.out)["methods"][0]["cut_off"] is True
        assert "ends at" not in call("explain", *ASK[1:], *few[:2], "--json").err

    def test_a_comparison_as_json_is_a_list(self, call: Callable[..., Result]) -> None:
        rows = json.loads(call(*ASK, "--method", "full", "--compare", "snapkv", "--json").out)
        assert [row["stats"]["method"] for row in rows] == ["full", "snapkv"]
        assert rows[0]["answer"] == ANSWER

    def test_a_comparison_with_itself_is_a_table_of_one(self, call: Callable[..., Result]) -> None:
        result = call(*ASK, "--method", "full", "--compare", "full")
        assert table_rows(result.out) == ["full"]
        assert not result.out.startswith(ANSWER)  # it is not printed as it comes, too

    @pytest.mark.parametrize(
        ("budget", "note"),
        [
            ("1", "[--budget 1 is one token: all of the prompt is 1.0, or 100%]"),
            ("1%", "[--budget 0.01 is 7 of this prompt's 694 tokens, hardly more than its end, 8 tokens, by which the"),
            ("9", None),
            ("1.0", None),
        ],
    )
    def test_a_budget_that_leaves_hardly_anything_is_told_of(
        self, call: Callable[..., Result], budget: str, note: str | None
    ) -> None:
        asked = ["--method", "snapkv", "--budget", budget]
        results = [call(*ASK, *asked), call("explain", *ASK[1:], *asked, "--no-answer")]
        assert all((note or "").lstrip("[") in result.err for result in results)
        assert any("--budget" in result.err for result in results) == (note is not None)

    def test_a_method_that_looks_at_less_of_a_prompts_end_has_room(self, call: Callable[..., Result]) -> None:
        """Its window is narrower at small budgets."""
        for narrow, notes in (("true", 0), ("false", 1)):
            asked = ["--method", "blend", "--set", f"narrow={narrow}", "--budget", "20"]
            results = [call(*ASK, *asked), call("explain", *ASK[1:], *asked, "--no-answer")]
            assert [result.err.count("hardly more than its end") for result in results] == [notes] * 2

    @pytest.mark.parametrize(("budget", "kept"), [("64", 64), ("1", 1), ("100%", None), ("1.0", None), ("99999", None)])
    def test_budgets(self, call: Callable[..., Result], budget: str, kept: int | None) -> None:
        """One at or below the window keeps the most recent tokens; a whole prompt is kept whole."""
        result = call(*ASK, "--method", "snapkv", "--budget", budget, "--json")
        stats = json.loads(result.out)["stats"]
        assert stats["retained_per_layer"] == [kept or stats["prompt_tokens"]] * 3

    @pytest.mark.parametrize(
        ("limits", "why"), [(["--max-loss", "1e-9", "--max-budget", "10%"], "the most that is"), ([], "")]
    )
    def test_a_prompt_that_decides_its_budget_is_told_of(
        self, call: Callable[..., Result], limits: list[str], why: str
    ) -> None:
        asked = [*ASK, "--budget", "auto", *limits]
        result = call(*asked)
        assert (result.code, result.out) == (0, f"{ANSWER}\n")
        assert why in result.err
        stats = json.loads(call(*asked, "--json").out)["stats"]
        assert stats["auto"]["tokens"] * 3 == sum(stats["retained_per_layer"])
        assert stats["auto"]["why"] in (["at_most"] if limits else ["loss", "least", "all"])

    @pytest.mark.parametrize("store", ["native", "int8", "int4"])
    def test_bytes_and_what_they_are_held_in(self, call: Callable[..., Result], store: str) -> None:
        result = call(*ASK, "--method", "snapkv", "--budget", "10%", "--of", "bytes", "--store", store, "--json")
        stats = json.loads(result.out)["stats"]
        assert (stats["budget"], stats["store"]) == ("10% of bytes", store)
        assert 0.08 * stats["kv_nbytes_full"] < stats["kv_nbytes"] <= 0.1 * stats["kv_nbytes_full"]
        assert (stats["retained_fraction"] > 0.15) == (store != "native")
        compared = call(*ASK, "--method", "snapkv", "--budget", "64", "--compare", "full", "--store", store, "--json")
        assert [one["stats"]["store"] for one in json.loads(compared.out)] == [store, "native"]

    @pytest.mark.parametrize(
        ("asked", "word", "field", "done"),
        [
            (
                ["--chunk-budget", "100", "--chunk-tokens", "64"],
                "cut 9 times while it was read, at most 164 held",
                "chunks",
                9,
            ),
            (["--chunk-budget", "1000"], "[--chunk-budget 1000 had no effect: where the prompt of ", "chunks", 0),
            (["--decode-budget", "96", "--decode-interval", "32"], "[--decode-budget 96 had no effect: ", "decode", 0),
            (["--candidates", "8"], "[--candidates 8 had no effect: method 'snapkv' decides layer by", "candidates", 0),
            (["--candidates", "8", "--two-pass"], "[--candidates 8 had no effect: what stays was ", "candidates", 0),
        ],
    )
    def test_what_is_held_meanwhile_is_told_of(
        self, call: Callable[..., Result], asked: list[str], word: str, field: str, done: int
    ) -> None:
        command = [*ASK, "--method", "snapkv", "--budget", "96", *asked]
        assert word in call(*command).err
        told = json.loads(call(*command, "--json").out)["stats"][field]
        assert told["num_layers" if field == "candidates" else "num_cuts"] == done
        assert (told["note"] is None) == (done > 0)
        compared = call(*command, "--compare", "full")
        assert compared.code == 0, "a method that keeps all is read as it is"
        assert (f"[snapkv: {word.lstrip('[')}" in compared.err) == (done == 0)
        if field != "decode" and "--two-pass" not in asked:
            page = call("explain", *command[1:], "--compare", "full", "--json")
            (explained, whole), answered = json.loads(page.out)["methods"], json.loads(call(*command, "--json").out)
            assert (explained[field], whole[field]) == (told, None)
            assert explained["answer"] == answered["answer"]
            assert sum(explained["layers"][0]["retained"]) == planted.NUM_KV_HEADS * 96
            assert word.lstrip("[") in page.err

    def test_options_of_the_method(self, call: Callable[..., Result]) -> None:
        result = call(*ASK, "--method", "snapkv", "--set", "window_size=16", "--set", "kernel-size=1")
        assert result.code == 0

    def test_two_passes_give_the_same_answer_and_can_write_the_plan(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        args = [*ASK, "--method", "vote", "--budget", "64", "--json"]
        once, path = json.loads(call(*args).out), tmp_path / "plan.json"
        result = call(*args, "--save-plan", str(path))
        assert result.code == 0
        twice = json.loads(result.out)
        assert twice["token_ids"] == once["token_ids"]
        same = ("method", "budget", "retained_per_layer", "kv_nbytes", "kv_nbytes_full")
        assert [twice["stats"][name] for name in same] == [once["stats"][name] for name in same]
        plan = read_plan(path)
        assert (plan.method, plan.budget, len(plan.shared_positions or ())) == ("vote", 64, 64)
        assert json.loads(call(*args, "--two-pass").out)["token_ids"] == once["token_ids"]

    def test_a_look_ahead_waits_before_it_evicts(self, call: Callable[..., Result]) -> None:
        args = [*ASK, "--method", "snapkv", "--budget", "64", "--max-new-tokens", "8", "--json"]
        full, waited = (json.loads(call(*args, "--set", f"lookahead={n}").out)["stats"] for n in (100, 2))
        assert full["kv_nbytes"] > full["kv_nbytes_full"] == waited["kv_nbytes_full"] > waited["kv_nbytes"]
        assert waited["retained_per_layer"] == [64] * 3
        assert full["retained_fraction"] == 1

    def test_a_compiled_step_gives_the_same_answer(self, call: Callable[..., Result]) -> None:
        ask = [*ASK, "--method", "snapkv", "--budget", "100", "--json"]
        plain = json.loads(call(*ask, "--compile", "never").out)
        hint = json.loads(call(*ask, "--dtype", "float32").out)["stats"]["not_compiled"]
        assert "`compresskv compile --model model --method snapkv --dtype float32` does that" in hint

        packed = json.loads(call(*ask, "--store", "int4").out)["stats"]["not_compiled"]
        assert "and store: `compresskv compile --model model --method snapkv --store int4` does that" in packed

        compiling = ["compile", "--model", "model", "--method", "snapkv", "--set", "window_size=4"]
        first = call(*compiling, "--json")
        assert first.err == "compiling the decode step, once for this model: about a minute\n"
        built = json.loads(first.out)
        assert (built["method"], built["built"]) == ("snapkv[window_size=4]", True)
        assert built["not_compiled"] is None
        assert built["compiled_ms"] > 0
        assert built["eager_ms"] > 0

        assert not json.loads(call(*compiling, "--json").out)["built"]
        assert re.fullmatch(r"compiled before; loaded in \d+\.\d s\n", call(*compiling).err)

        compiled = json.loads(call(*ask, "--compile", "always").out)
        assert compiled["token_ids"] == plain["token_ids"]
        assert compiled["stats"]["compiled_tokens"] == len(plain["token_ids"]) - 1
        told = call(*ASK, "--method", "snapkv", "--budget", "100", "--compile", "always")
        assert " (compiled; " in told.err

    def test_truncation_cuts_the_middle_and_says_so(self, call: Callable[..., Result]) -> None:
        long = ["ask", "long.txt", QUESTION, "--model", "model", "--method", "full", "--truncate", "middle"]
        result = call(*long)
        assert (result.code, result.out) == (0, f"{ANSWER}\n")
        assert "cut from the middle" in result.err
        stats = json.loads(call(*long, "--json").out)["stats"]
        assert stats["truncated_tokens"] > 1000
        assert stats["prompt_tokens"] <= planted.CONTEXT_LENGTH - 128

    def test_a_profile_by_its_file(self, call: Callable[..., Result], place: Path, tmp_path: Path) -> None:
        write_profile(planted_profile(), tmp_path / "mine.json")
        result = call(*ASK, "--profile", str(tmp_path / "mine.json"))
        assert (result.code, result.out) == (0, f"{ANSWER}\n")

    def test_the_profile_is_of_the_method_that_cuts_the_answer_too(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        write_profile(replace(planted_profile(), query_centres=None), tmp_path / "old.json")
        cut = ["--decode-budget", "20", "--decode-method", "triattention", "--profile", str(tmp_path / "old.json")]
        assert_refused(call(*ASK, "--method", "snapkv", *cut), "no centres of queries", "'compresskv profile MODEL'")


def table_rows(output: str) -> list[str]:
    """The methods that a line of numbers begins with."""
    return [name for name in re.findall(r"^\W*(\w+)\W+[\d,]+\W", output, re.MULTILINE) if name in METHODS]


class TestBadInput:
    """Each is refused in one line. Those that need no model are refused before torch is imported."""

    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ("missing.txt", ["'missing.txt'", "No such file"]),
            (".", ["'.'", "Is a directory"]),
            ("empty.txt", ["'empty.txt'", "is empty"]),
            ("binary.pdf", ["'binary.pdf'", "is binary"]),
            ("latin.txt", ["'latin.txt'", "not UTF-8"]),
            ("-", ["standard input", "is empty"]),
        ],
    )
    def test_documents_in_new_processes(self, start: Callable[..., Result], document: str, words: list[str]) -> None:
        assert_refused(start("ask", document, QUESTION, "--model", "model"), *words)

    @pytest.mark.parametrize("budget", ["0", "-5", "1.5", "abc", "", "0%", "101%", "nan", "0.0"])
    def test_budgets_in_new_processes(self, start: Callable[..., Result], budget: str) -> None:
        assert_refused(start(*ASK, f"--budget={budget}"), f"--budget {budget!r} ")

    def test_a_closed_standard_input(self, start: Callable[..., Result]) -> None:
        assert_refused(
            start("ask", "-", QUESTION, stdin=None, preexec_fn=lambda: os.close(0)), "standard input is closed"
        )

    def test_bytes_that_are_no_text_as_a_question(self, call: Callable[..., Result]) -> None:
        """This is how Python hands over the bytes FF FE."""
        assert_refused(call("ask", "doc.txt", "\udcff\udcfe", "--model", "model", "--method", "full"), "not valid text")

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--method", "snapvk"], ["--method 'snapvk' is unknown", "did you mean 'snapkv'"]),
            (["--method", "banana"], ["--method 'banana'", "choose from"]),
            (["--method", ""], ["--method '' is unknown"]),
            (["--compare", "snapkv,strem"], ["--compare 'strem' is unknown"]),
            (
                ["--method", "snapkv", "--set", "windowsize=8"],
                ["--set 'windowsize=8' is no option", "did you mean 'window_size'"],
            ),
            (["--method", "snapkv", "--set", "window_size=0"], ["--set 'window_size=0' must"]),
            (["--method", "snapkv", "--set", "window_size=1.5"], ["window_size=1.5"]),
            (["--method", "snapkv[kernel_size=4]"], ["--method 'snapkv[kernel_size=4]': kernel_size=4"]),
            (["--set", "profile=3"], ["profile"]),
            (["--method", "full", "--max-new-tokens", "0"], ["--max-new-tokens 0 must"]),
            (["--method", "full", "--max-new-tokens", "2048"], ["--max-new-tokens 2048", "2048 tokens"]),
            (["--store", "int5"], ["--store 'int5' is unknown", "int8"]),
            (["--budget", "3", "--of", "heads"], ["--of 'heads' must be tokens or bytes"]),
            (["--budget", "3", "--of", "bytes"], ["--budget '3'", "share"]),
            (["--budget", "auto", "--method", "snapkv"], ["--budget 'auto'", "not 'snapkv'"]),
            (["--budget", "auto", "--compare", "vote"], ["--budget 'auto'", "not 'vote'"]),
            (["--budget", "auto", "--max-loss", "0"], ["--max-loss 0.0 must be a number above 0"]),
            (["--budget", "auto", "--max-budget", "many"], ["--max-budget 'many' is no budget: give tokens"]),
            (["--max-loss", "0.1"], ["--max-loss 0.1 is for --budget 'auto', not for '256'"]),
            (["--budget", "5%", "--max-budget", "9%"], ["--max-budget '9%' is for --budget 'auto'"]),
            (["--method", "full", "--truncate", "end"], ["--truncate 'end'", "middle"]),
            (["--method", "full", "--dtype", "int16"], ["--dtype 'int16'"]),
            (["--method", "full", "--device", "cuda:99"], ["--device 'cuda:99'"]),
            (["--profile", "missing.json"], ["--profile 'missing.json'", "no such file"]),
            (["--profile", "doc.txt"], ["--profile 'doc.txt' is not JSON"]),
            (["--profile", "."], ["--profile '.'"]),
            (["--save-plan", "nowhere/plan.json"], ["--save-plan 'nowhere/plan.json'", "there is no folder"]),
            (["--save-plan", "."], ["--save-plan '.'", "is a folder: give a file"]),
            (["--save-plan", "plan.json", "--compare", "full"], ["--save-plan 'plan.json'", "--compare"]),
            (["--two-pass", "--set", "lookahead=2"], ["--two-pass", "look ahead"]),
        ],
        ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
    )
    def test_options(self, call: Callable[..., Result], args: list[str], words: list[str]) -> None:
        assert_refused(call(*ASK, *args), *words)

    @pytest.mark.parametrize("question", ["", "  \n"])
    def test_an_empty_question(self, call: Callable[..., Result], question: str) -> None:
        assert_refused(call("ask", "doc.txt", question, "--model", "model", "--method", "full"), "question is empty")

    def test_a_prompt_above_the_context_is_refused_with_both_numbers(self, call: Callable[..., Result]) -> None:
        result = call("ask", "long.txt", QUESTION, "--model", "model", "--method", "full")
        assert_refused(result, str(planted.CONTEXT_LENGTH - 128), "--truncate 'middle'")
        (needed,) = re.findall(r"prompt has (\d+) tokens", result.err)
        assert int(needed) > planted.CONTEXT_LENGTH

    def test_a_question_longer_than_the_context(self, call: Callable[..., Result]) -> None:
        question = "What of amber? " * 700
        result = call("ask", "doc.txt", question, "--model", "model", "--method", "full", "--truncate", "middle")
        assert_refused(result, "the question alone")

    def test_a_profile_of_another_model_with_both_fingerprints(
        self, call: Callable[..., Result], place: Path, tmp_path: Path
    ) -> None:
        other, _ = planted.build(noise=0.01)
        foreign = planted_profile().to_dict()
        foreign["model"] = {"id": "other", "fingerprint": structs.asdict(fingerprint(other))}
        (tmp_path / "other.json").write_text(json.dumps(foreign), encoding="utf-8")
        result = call(*ASK, "--profile", str(tmp_path / "other.json"))
        assert_refused(result, str(fingerprint(other)), str(fingerprint(planted.model())))

    def test_a_model_without_a_profile_is_told_how_to_get_one(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        assert_refused(call(*ASK), "no profile of this model", "compresskv profile model")

    def test_a_damaged_profile_of_the_model_is_named(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        path = default_path(fingerprint(planted.model()))
        path.parent.mkdir(parents=True)
        path.write_text("{}", encoding="utf-8")
        assert_refused(call(*ASK), path.name, "delete it")


class TestBadModels:
    def ask(self, call: Callable[..., Result], model: str | Path) -> Result:
        return call("ask", "doc.txt", QUESTION, "--model", str(model), "--method", "full")

    @pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "nowhere.gguf", "smollm2-135", "", "doc.txt"])
    def test_unknown_ones(self, call: Callable[..., Result], model: str) -> None:
        assert_refused(self.ask(call, model), "--model", model)

    def test_a_name_on_two_lines_is_told_on_one(self, call: Callable[..., Result]) -> None:
        assert_refused(self.ask(call, "./no\nsuch"), r"--model './no\nsuch'")

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 100, b"text " * 100])
    def test_damaged_gguf_files(self, call: Callable[..., Result], tmp_path: Path, content: bytes) -> None:
        (tmp_path / "damaged.gguf").write_bytes(content)
        assert_refused(self.ask(call, tmp_path / "damaged.gguf"), "damaged.gguf")

    def test_an_empty_folder(self, call: Callable[..., Result], tmp_path: Path) -> None:
        assert_refused(self.ask(call, tmp_path), "no config.json")

    @pytest.mark.parametrize("damage", ["cut", "missing"])
    def test_damaged_weights(self, call: Callable[..., Result], tmp_path: Path, damage: str) -> None:
        weights = planted.save(tmp_path / "model") / "model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        else:
            weights.unlink()
        assert_refused(self.ask(call, tmp_path / "model"), "--model")

    def test_a_model_with_another_architecture(self, call: Callable[..., Result], tmp_path: Path) -> None:
        config = T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        planted.tokenizer().save_pretrained(tmp_path / "t5")
        assert_refused(self.ask(call, tmp_path / "t5"), "encoder-decoder")

    def test_a_model_without_full_attention(self, call: Callable[..., Result], tmp_path: Path) -> None:
        config = AutoConfig.for_model("mamba", vocab_size=120, hidden_size=16, state_size=4, num_hidden_layers=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
        planted.tokenizer().save_pretrained(tmp_path / "mamba")
        result = call("ask", "doc.txt", QUESTION, "--model", str(tmp_path / "mamba"), "--method", "snapkv")
        assert_refused(result, "Mamba")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a long document, and such a document: seconds a layer."""
    folder = tmp_path_factory.mktemp("slow")
    config = json.loads((planted.save(folder / "model") / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 1_000_000
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "doc.txt").write_text(" ".join(planted.haystack_sentences(1200)), encoding="utf-8")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals and SIGINT are POSIX")
class TestInterrupt:
    def test_ctrl_c_while_the_document_is_read(self, slow: Path) -> None:
        """Standard error is a terminal, so that the progress bar shows when reading has begun."""
        import pty

        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "compresskv", "ask", "doc.txt", QUESTION, "-m", "model", "--method", "snapkv"]
        with subprocess.Popen(
            command, cwd=slow, env=environment(slow), stdout=subprocess.PIPE, stderr=theirs
        ) as process:
            os.close(theirs)
            seen = b""
            while b"reading" not in seen:
                seen += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            rest = drained(ours)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert out == b""
        assert b"Traceback" not in seen + rest
        *_, last = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", rest).replace(b"\r", b"\n").split()
        assert last == b"interrupted"
        assert b"compresskv: interrupted" in rest


def drained(terminal: int) -> bytes:
    """All that comes until the other end is closed."""
    data = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that nobody has the other end any more
            piece = b""
        if not piece:
            os.close(terminal)
            return data
        data += piece


@pytest.mark.slow
def test_the_embedded_model_answers_from_the_command_line(tmp_path: Path) -> None:
    """The machine's own cache: the first run on it fetches the model."""
    text = "The harbour master of Ostrand is a patient woman named Ingrid Vahl. " * 3 + "Ships come and go. " * 60
    (tmp_path / "doc.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "compresskv", "ask", "doc.txt", "Who is the harbour master of Ostrand?"]
    command += ["--method", "snapkv", "--budget", "50%", "--max-new-tokens", "24", "--json"]
    usual = {name: value for name, value in os.environ.items() if name != "SETUPTOOLS_USE_DISTUTILS"}  # of the tests
    environment = usual | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    data = json.loads(done.stdout)
    assert "Ingrid" in data["answer"]
    assert len(data["stats"]["retained_per_layer"]) == 30
    assert data["stats"]["kv_nbytes"] < 0.6 * data["stats"]["kv_nbytes_full"]
