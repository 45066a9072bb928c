"""`compresskv bench` as its users meet it: what it prints, and what it refuses. Never how long anything takes."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Result, runner
from compresskv.bench import limits, peers, rounds, run, stored
from compresskv.bench.config import BenchConfig, stages
from compresskv.bench.engine import measure_engine
from compresskv.bench.peers import BenchRequest, find_peer, measure_peer
from compresskv.bench.stored import StoredRun
from compresskv.bench.subject import Subject, random_subject, real_subject
from compresskv.errors import ConfigError
from compresskv.peers.answers import read_request, write_request
from compresskv.peers.engines import Generator, weights_name
from compresskv.peers.process import KVPRESS, LLAMA_CPP, VLLM, Environment, peers_python

TINY = ["bench", "--random", "tiny", "--repeats", "2", "--new-tokens", "5", "--dtype", "float32", "--device", "cpu"]
SMALL = [*TINY, "--lengths", "96,200", "--budgets", "64,full"]
QUICK = [*TINY, "--lengths", "96,200", "--budgets", "full"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process, with quick stand-ins for the machine's limits."""
    monkeypatch.setitem(limits._READ_NBYTES, "cpu", 1 << 20)
    monkeypatch.setitem(limits._MATRIX_SIZE, "cpu", 64)
    monkeypatch.setattr(limits, "_LEAST_S", 0.0)
    return runner(monkeypatch, capfd, columns=80)


def test_json_alone_on_standard_output(call: Callable[..., Result], tmp_path: Path) -> None:
    result = call(*SMALL, "--json", "-o", tmp_path / "new" / "run.json", "--plot", tmp_path / "run.png")
    found = json.loads(result.out)

    assert result.code == 0
    assert result.err == f"result: {tmp_path / 'new' / 'run.json'}\nfigure: {tmp_path / 'run.png'}\n"
    assert json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8")) == found
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert set(found["versions"]) == {"compresskv", "torch", "transformers", "python"}
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["model"]["name"] == "random tiny"
    assert found["model"]["dtype"] == "float32"
    assert found["limits"]["read_bytes_per_s"] > 0
    assert any("random weights" in note for note in found["notes"])
    assert [(row["length"], row["method"], row["budget"]) for row in found["rows"]] == [
        *((length, *one) for length in (96, 200) for one in _lines(64)),
        *((64, *one) for one in _lines(64)),
    ]
    _check_rows(found["rows"])


def _lines(budget: int) -> list[tuple[str, int | None]]:
    return [("plain", None), ("full", None), ("snapkv", budget), ("blend", budget)]


def _check_rows(rows: list[dict[str, Any]]) -> None:
    nbytes_a_token = 4 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
    for row in rows:
        kept = row["prompt_tokens"] if row["budget"] is None else min(row["budget"], row["prompt_tokens"])
        assert row["kv_nbytes"] == kept * nbytes_a_token
        assert row["held_tokens"] == kept
        assert row["within_budget"] == (row["budget"] == row["length"])
        scores = row["budget"] is not None and not row["within_budget"]
        assert (row["num_scorings"] > 0) == (row["scoring_s"] > 0) == scores
        assert (row["decode_ratio_short"] is not None) == scores
        assert len(row["rounds"]) == 2
        for key in ("prefill_s", "first_token_s", "decode_ms", "least_prefill_s", "least_decode_ms", "prefill_ratio"):
            assert row[key] > 0
        if row["method"] == "plain":
            assert row["engine"] == "transformers"
            assert row["prefill_ratio"] == row["decode_ratio"] == row["kv_ratio"] == 1


@pytest.mark.usefixtures("stored_packages")
def test_ways_of_decoding(call: Callable[..., Result]) -> None:
    ways = ["--lengths", "96", "--budgets", "64", "--methods", "snapkv", "--decode", "eager,compiled,int8"]
    rows = json.loads(call(*TINY, *ways, "--json").out)["rows"]
    assert [(row["method"], row["decode"]) for row in rows if row["length"] == 96] == [
        ("plain", "eager"),
        *(("snapkv", way) for way in ("eager", "compiled", "int8")),
    ]
    own = {row["decode"]: row for row in rows if row["length"] == 96 and row["method"] == "snapkv"}
    assert own["eager"]["kv_nbytes"] == own["compiled"]["kv_nbytes"] == own["int8"]["kv_nbytes"]
    assert own["int8"]["decode_nbytes"] < own["compiled"]["decode_nbytes"] == own["eager"]["decode_nbytes"]


def test_tables_fit_a_terminal(call: Callable[..., Result]) -> None:
    result = call(*TINY, "--lengths", "96", "--budgets", "64,full", "--repeats", "1")
    assert (result.code, result.err) == (0, "")
    for words in ("96 tokens: reading the prompt", "96 tokens: generating, and memory", "0 times", "GB/s", "random"):
        assert words in result.out
    tables = [line for line in result.out.splitlines() if re.match(r"^ ?(plain|full|snapkv|blend)", line)]
    assert len(tables) == 2 * 4 + 2
    assert all(len(line.rstrip()) <= 80 for line in tables)
    held = r"^ snapkv 64( +[\d.-]+){4} +64 +0\.\d "  # in tokens and megabytes
    assert re.search(held, result.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--lengths", "many"], "--lengths 'many'"),
        (["--lengths", "0"], "--lengths 0"),
        (["--lengths", ","], "--lengths ',' names no number"),
        (["--budgets", "some"], "--budgets 'some'"),
        (["--budgets", "9B"], "--budgets '9B' has no room for one token"),
        (["--methods", "snapvk"], "--methods 'snapvk' is unknown: did you mean 'snapkv'?"),
        (["--repeats", "0"], "--repeats 0"),
        (["--new-tokens", "1"], "--new-tokens 1"),
        (["--random", "llama-9b"], "--random 'llama-9b' is unknown: did you mean"),
        (["--layers", "0"], "--layers 0"),
        (["--layers", "1000000000"], "with 1000000000 layers"),
        (["--model", "smollm2-135m"], "--model 'smollm2-135m' and --random 'tiny' exclude each other"),
        (["--profile", "p.json"], "--profile 'p.json' and --random 'tiny' exclude each other"),
        (["--plot", "figure.txt"], "--plot 'figure.txt'"),
        (["--plot", "."], "--plot '.' is a folder"),
        (["--output", "."], "--output '.' is a folder"),
        (["--output", "/proc/run.json"], "--output '/proc/run.json' cannot be written"),
        (["--decode", "fast"], "--decode 'fast' is unknown: choose from eager, compiled, int8"),
        (["--peers", "llama.cpp"], "--peers 'llama.cpp' needs a real model, not --random 'tiny'"),
        (["--peers", "kvpres"], "--peers 'kvpres' is unknown: did you mean 'kvpress'?"),
        (["--dtype", "float3"], "--dtype 'float3'"),
        (["--device", "tpu9"], "--device 'tpu9'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(args: list[str], words: str, call: Callable[..., Result]) -> None:
    result = call(*TINY, *args)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"compresskv: [^\n]+\n", result.err), result.err
    assert words in result.err


def test_layers_need_a_geometry(call: Callable[..., Result]) -> None:
    result = call("bench", "--layers", "2")
    assert (result.code, result.out) == (2, "")
    assert "--layers 2 needs --random" in result.err


@pytest.mark.parametrize(("peer", "environment"), [("kvpress", KVPRESS), ("vllm", VLLM), ("llama.cpp", LLAMA_CPP)])
def test_a_missing_environment_for_peers_is_told_before_anything_is_measured(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, peer: str, environment: Environment
) -> None:
    monkeypatch.setenv(environment.variable, "/nowhere/python")
    result = call("bench", "--lengths", "96", "--peers", peer)
    assert (result.code, result.out) == (2, "")
    assert environment.script in result.err


def test_ctrl_c_shows_what_was_measured(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    own = run.run_rounds

    def once(model: Any, input_ids: Any, *args: Any, **options: Any) -> Any:
        if input_ids.shape[1] == 200:
            raise KeyboardInterrupt
        return own(model, input_ids, *args, **options)

    monkeypatch.setattr(run, "run_rounds", once)
    result = call(*SMALL, "--json")
    assert result.code == 130
    assert result.err == "compresskv: interrupted\n"
    assert {row["length"] for row in json.loads(result.out)["rows"]} == {96}


def test_interrupts_in_a_row_lose_nothing_and_the_run_goes_on(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second comes while what the first one left is about to be shown, as `timeout -s INT` sends them."""
    own_rounds, own_result = run.run_rounds, StoredRun.result
    lengths: list[int] = []
    interrupting = True

    def measured(model: Any, input_ids: Any, *args: Any, **options: Any) -> Any:
        lengths.append(input_ids.shape[1])
        if input_ids.shape[1] == 200 and interrupting:
            signal.raise_signal(signal.SIGINT)
        return own_rounds(model, input_ids, *args, **options)

    def result(stored: StoredRun) -> dict[str, Any]:
        if len(lengths) == 2 and interrupting:  # the run has ended by then
            signal.raise_signal(signal.SIGINT)
        return own_result(stored)

    monkeypatch.setattr(run, "run_rounds", measured)
    monkeypatch.setattr(StoredRun, "result", result)
    path = tmp_path / "new" / "run.json"
    command = [*QUICK, "-o", path, "--json"]
    ended = call(*command)
    assert ended.code == 130
    half = json.loads(path.read_text(encoding="utf-8"))
    assert {row["length"] for row in half["rows"]} == {96}
    assert json.loads(ended.out)["rows"] == half["rows"]
    kept = path.read_text(encoding="utf-8")
    others = kept.replace('"method": "full"', '"method": "adakv"')
    for text, options, what in ((kept, ["--repeats", "7"], "settings"), (others, [], "methods")):
        path.write_text(text, encoding="utf-8")
        other = call(*command, *options)
        assert (other.code, other.out) == (2, "")
        assert f"run.json' holds an unfinished run with other {what}: name another file, or delete it" in other.err
        assert path.read_text(encoding="utf-8") == text
    path.write_text(kept, encoding="utf-8")

    interrupting = False
    gone_on = call(*command)
    assert gone_on.code == 0
    assert "going on with" in gone_on.err
    assert lengths == [96, 200, 200]
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert "unfinished" not in whole
    assert {row["length"] for row in whole["rows"]} == {96, 200}
    figures = ("prefill_s", "decode_ms", "rounds", "prefill_ratio")
    before = [[row[figure] for figure in figures] for row in half["rows"]]
    assert [[row[figure] for figure in figures] for row in whole["rows"]][: len(before)] == before

    lengths.clear()
    call(*command)  # a finished run is measured anew
    assert lengths == [96, 200]


def test_rounds_before_an_interrupt_are_shown_and_measured_again(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, begun = rounds._round, list[int]()

    def one(*args: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(rounds, "_round", one)
    path = tmp_path / "run.json"
    command = [*TINY, "--lengths", "96", "--budgets", "full", "-o", path, "--json"]
    ended = call(*command)
    assert ended.code == 130
    half = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert json.loads(ended.out)["rows"] == half
    assert {len(row["rounds"]) for row in half} == {1}
    whole = json.loads(call(*command).out)["rows"]
    assert {len(row["rounds"]) for row in whole} == {2}
    assert len(begun) == 4


def test_a_file_that_cannot_be_written_costs_no_figures(
    call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write_text", full)
    result = call(*QUICK, "-o", tmp_path / "run.json", "--json")
    assert result.code == 2
    assert "No space left on device" in result.err
    assert {row["length"] for row in json.loads(result.out)["rows"]} == {96, 200}


def test_help_has_examples(call: Callable[..., Result]) -> None:
    result = call("bench", "--help")
    assert result.code == 0
    for words in ("Examples:", "--random llama-1b", "--peers kvpress,vllm,llama.cpp", "docs/speed.md"):
        assert words in result.out


def test_a_request_to_peers_survives_its_file(tmp_path: Path) -> None:
    config = BenchConfig((96,), (64, 0.5, "3MB"), True, 2, 5)
    request = BenchRequest("kvpress", "tiny", 4, "float32", "cpu", (1, 2), config, 2)
    write_request(tmp_path / "request.json", request)
    assert read_request(tmp_path / "request.json", BenchRequest) == request


@pytest.mark.slow
def test_kvpress_in_its_own_environment() -> None:
    try:
        python = find_peer("kvpress", "tiny", random=True)
    except ConfigError:
        pytest.skip("there is no environment for kvpress: scripts/peers makes .venv-peers")
    config = BenchConfig((200,), (100, "25% of bytes"), False, 1, 5)
    subject: Subject = random_subject("tiny", None, config.most_tokens, dtype="float32", device="cpu")
    rows = list(measure_peer("kvpress", python, subject, config, (), lambda message, fraction: None))

    assert [note for note in subject.notes if "failed" in note] == []
    names = ("plain", "kvpress:SnapKVPress", "kvpress:AdaKVPress(SnapKVPress)")
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, name) for length, own in ((200, (*names, *names[1:])), (100, names)) for name in own
    ]
    plain, freeing, masking, in_bytes = rows[:4]
    assert (in_bytes["budget"], in_bytes["held_tokens"]) == ("25% of bytes", 50)
    assert in_bytes["kv_nbytes"] == plain["kv_nbytes"] // 4
    assert [row["engine"] for row in rows[:3]] == ["transformers", "kvpress", "kvpress"]
    assert (plain["held_tokens"], freeing["held_tokens"], masking["held_tokens"]) == (200, 100, 200)
    assert freeing["eviction_s"] > 0
    assert freeing["scoring_s"] is None
    assert freeing["versions"]["kvpress"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_an_engine_in_its_own_environment(name: str) -> None:
    try:
        python = find_peer(name, "smollm2-135m", random=False)
    except ConfigError as error:
        pytest.skip(str(error))
    config = BenchConfig((100, 200), (64,), False, 2, 5)
    subject = real_subject("smollm2-135m", dtype="float32", device="cpu")
    plain = run.Bench(subject, config)
    plain.run(stages(config, lambda budget: ()), lambda message, fraction: None)
    rows = list(measure_peer(name, python, subject, config, plain.rows, lambda message, fraction: None))
    assert [(row["engine"], row["prompt_tokens"]) for row in rows] == [(name, 100), (name, 200)]
    assert all(row["prefill_s"] > 0 and row["decode_ms"] > 0 for row in rows)
    assert rows[1]["decode_ratio"] == rows[1]["decode_ms"] / plain.rows[1].decode_ms
    assert rows[0]["versions"]


def test_an_engine_that_is_installed_here_needs_no_other_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.delenv(VLLM.variable, raising=False)
    assert peers_python(environment=replace(VLLM, package="torch")) == Path(sys.executable)
    with pytest.raises(ConfigError, match="scripts/environment-vllm"):
        peers_python(environment=replace(VLLM, package="no_such_package"))


def test_llama_cpp_reads_gguf_files_alone(call: Callable[..., Result]) -> None:
    result = call("bench", "--model", "org/name", "--peers", "llama.cpp")
    assert (result.code, result.out) == (2, "")
    assert result.err == "compresskv: --peers 'llama.cpp' reads .gguf files, and --model 'org/name' is none\n"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/cache/smollm2-135m-b179-v1.SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Llama-3.2-1B-Q4_K_M.gguf", "Q4_K_M"),
        ("model-IQ3_XS.gguf", "IQ3_XS"),
        ("model.f16.gguf", "f16"),
        ("model.gguf", "GGUF"),
    ],
)
def test_the_weights_of_a_gguf_file_are_named(file: str, name: str) -> None:
    assert weights_name(file) == name


@pytest.mark.parametrize(
    ("weights", "dtype", "told"), [("Q4_1", None, "Q4_1"), (None, "int8", "8-bit"), (None, None, "")]
)
def test_a_peer_with_other_weights_is_told(
    monkeypatch: pytest.MonkeyPatch, weights: str | None, dtype: str | None, told: str
) -> None:
    row = {"prompt_tokens": 96, "weights": weights}
    monkeypatch.setattr(peers, "run_peers", lambda *_: iter([row, row]))
    subject = random_subject("tiny", None, 100, dtype="float32", device="cpu")
    subject.notes.clear()
    if dtype == "int8":
        monkeypatch.setattr(peers, "weights_dtype", lambda _: dtype)
    config = BenchConfig((96,), (64,), False, 1, 4)
    assert len(list(measure_peer("llama.cpp", Path("python"), subject, config, (), lambda *_: None))) == 2
    assert [told in note for note in subject.notes] == [True] * bool(told)


def test_what_an_engine_fails_at_does_not_end_it() -> None:
    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        if len(token_ids) == 200:
            raise RuntimeError("no room\nmore")
        yield from range(num_new)

    config = BenchConfig((96, 200, 250), (), True, 2, 5)
    request = BenchRequest("own", "smollm2-135m", None, "float32", "cpu", tuple(range(300)), config, 2)
    rows = measure_engine(request, Generator("own, full", {"own": "1"}, generate))
    found = [row for row in rows if "fraction" not in row]
    assert [row["length"] for row in found] == [96, 200, 250]
    assert found[1] == {"length": 200, "error": "no room"}
    assert found[2]["decode_ms"] >= 0
