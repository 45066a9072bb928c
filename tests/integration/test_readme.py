"""The README's commands and code, run as they stand, on the embedded model and a text of our own."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compresskv
from commands import Result, runner
from compresskv import generation
from compresskv.explain import retention
from compresskv.models.decoding import decode

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
BLOCK_COMMANDS = [
    [line.split("#")[0].strip() for line in block.splitlines() if "compresskv " in line]
    for language, block in BLOCKS
    if not language and "compresskv " in block
]
COMMANDS = [command for commands in BLOCK_COMMANDS for command in commands]
# What is for readers to replace, and what would need a hub or hours.
PLACEHOLDERS = {"--model org/name": "--model smollm2-135m"}
LONG = (
    "compresskv profile org/name",
    "compresskv profile verify",
    "compresskv profile import",
    "compresskv bench",
    "compresskv compile",
    "compresskv serve",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded_model):
    folder = tmp_path_factory.mktemp("readme")
    text = "The report is about boats. The contract was signed by Ada Marsh on Monday. Nothing else happened. "
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "report.txt").write_text(text + "The sea was calm. " * 60, encoding="utf-8")
    return folder


@pytest.fixture
def short_answers(monkeypatch) -> None:
    """Answers end after a few tokens: what they say of this text is not judged."""

    def decode_few(model, tokenizer, first, cache, max_new_tokens, *others):
        return decode(model, tokenizer, first, cache, min(max_new_tokens, 8), *others)

    for module in (generation, retention):
        monkeypatch.setattr(module, "decode", decode_few)


@pytest.fixture
def call(folder, monkeypatch, capfd) -> Callable[..., Result]:
    """Run a command in that folder and, but for pipes, in this process, which has PyTorch already."""
    monkeypatch.chdir(folder)
    in_process = runner(monkeypatch, capfd, columns=80)

    def call(command: str) -> Result:
        if "|" not in command:
            return in_process(*shlex.split(command)[1:])
        whole = command.replace("compresskv ", f"{shlex.quote(sys.executable)} -m compresskv ", 1)
        done = subprocess.run(whole, shell=True, capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def test_commands_were_found():
    assert len(COMMANDS) >= 6


def test_the_first_question_has_the_answer_that_is_promised(call):
    (command,) = [one for one in COMMANDS if "examples/" in one]
    code, out, err = call(command)
    assert re.search(r"this ends with (\d+), from 256 of 4,997 tokens", README)[1] == "7391"
    assert (code, out.strip().removesuffix(".")[-4:]) == (0, "7391"), err
    assert "4,997 prompt tokens, 256 kept per layer" in err


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("commands", BLOCK_COMMANDS, ids=lambda commands: commands[0][:40])
def test_commands_of_a_block_in_order(commands, call):
    for written in commands:
        if written.startswith(LONG) or "examples/" in written:  # the latter has a test of its own
            continue
        command = written
        for placeholder, real in PLACEHOLDERS.items():
            command = command.replace(placeholder, real)
        code, out, err = call(command)
        assert code == 0, err
        assert out.strip()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(LONG)])
def test_long_commands_name_real_options(command):
    words = [word for word in shlex.split(command)[1:] if word.startswith("--")]
    group = [word for word in shlex.split(command)[1:3] if not word.startswith("--")]
    if command.startswith(LONG[0]):
        group = ["profile", "find"]
    help_text = subprocess.run(
        [sys.executable, "-m", "compresskv", *group, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_text for word in words)


@pytest.mark.usefixtures("short_answers")
def test_python_code(embedded_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = embedded_model
    code = [block for language, block in BLOCKS if language == "python"]
    assert len(code) == 2
    names = {"model": model, "inputs": tokenizer("The sea was calm. " * 80, return_tensors="pt")}
    exec(code[0], names)
    assert names["cache"].compressed_layers[0].positions.shape[-1] == 256
    names["text"] = "The contract was signed by Ada Marsh. " + "The sea was calm. " * 80
    exec(code[1], names)
    assert names["generation"].stats.retained_fraction == pytest.approx(0.05, abs=0.01)
    answered = [
        session.ask("When?", max_new_tokens=8).token_ids
        for session in (names["session"], compresskv.open_session("report.kvc", names["model"], names["tokenizer"]))
    ]
    assert answered[0] == answered[1]
