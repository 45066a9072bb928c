"""Every refusal is one line in one style, whoever refuses: our checks, the parser of options, or the system."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import Result, commands, runner
from compresskv import cli as commands_folder
from compresskv.cli.terminal import counted
from compresskv.selection.budget_words import BYTES_KIND, SHARE_KIND, TOKENS_KIND, in_words, note_of

COMMANDS = list(commands())
NUMBERS = (
    *("--limit", "--seed", "--max-prompt-tokens", "--max-new-tokens", "--layers", "--repeats"),
    *("--new-tokens", "--length", "--documents"),
)
NAMES = [" ".join(words) for words, _ in COMMANDS]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    return runner(monkeypatch, capfd, columns=80)


def refused(result: Result) -> str:
    """The one line on standard error, without the program's name."""
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("compresskv: ")
    return line.removeprefix("compresskv: ")


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=NAMES)
class TestParser:
    def test_an_unknown_option(self, call: Callable[..., Result], words: list[str], command: Any) -> None:
        if words == ["serve"]:
            pytest.skip("unknown options go to vLLM")
        line = refused(call(*words, "--jason"))
        assert line.startswith(f"--jason is no option of 'compresskv {' '.join(words)}'")
        assert ("did you mean --json?" in line) == ("--json" in {opt for one in command.params for opt in one.opts})

    def test_missing_arguments(self, call: Callable[..., Result], words: list[str], command: Any) -> None:
        required = [one for one in command.params if one.required]
        if not required:
            pytest.skip("it needs none")
        line = refused(call(*words))
        first = required[0]
        name = first.opts[0] if first.param_type_name == "option" else first.metavar or first.name.upper()
        assert line.startswith(f"{name} is missing: compresskv {' '.join(words)} ")

    def test_whole_numbers(self, call: Callable[..., Result], words: list[str], command: Any) -> None:
        for one in command.params:
            option = max(one.opts, key=len)
            if option in NUMBERS and words != ["profile", "import"]:  # whose --layers is a file
                assert refused(call(*words, option, "many")) == f"{option} 'many' is no whole number"
                assert refused(call(*words, f"{option}=1.5")) == f"{option} '1.5' is no whole number"

    def test_an_option_without_its_value(self, call: Callable[..., Result], words: list[str], command: Any) -> None:
        takes_value = [one for one in command.params if one.param_type_name == "option" and not one.is_flag]
        for one in takes_value:
            option = max(one.opts, key=len)
            assert refused(call(*words, option)) == f"{option} needs a value"

    def test_a_value_of_an_option_that_has_none(
        self, call: Callable[..., Result], words: list[str], command: Any
    ) -> None:
        for one in command.params:
            if getattr(one, "is_flag", False) and not one.secondary_opts:
                option = max(one.opts, key=len)
                assert refused(call(*words, f"{option}=1")) == f"{option} takes no value"


@pytest.mark.parametrize(
    "words", [[], ["profile"], *[words for words, _ in COMMANDS]], ids=lambda words: " ".join(words) or "compresskv"
)
def test_help_has_examples_and_cuts_no_word(call: Callable[..., Result], words: list[str]) -> None:
    result = call(*words, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Example" in result.out
    lines = result.out.splitlines()
    assert [line for line in lines[1:] if line.endswith("...")] == []
    assert [line for line in lines if len(line) > 80] == []


def test_all_tables_have_one_look() -> None:
    folder = Path(commands_folder.__file__).parent
    found = {path.name: path.read_text(encoding="utf-8").count("Table(") for path in folder.glob("*.py")}
    assert {name for name, number in found.items() if number} == {"terminal.py"}


@pytest.mark.parametrize(
    ("args", "numbers"),
    [
        (["profile", "show", "smollm2-135m"], ["rank", "semantic score", "error"]),
        (["models"], ["context"]),
    ],
    ids=["profile show", "models"],
)
def test_numbers_end_below_the_end_of_their_title(
    call: Callable[..., Result], args: list[str], numbers: list[str]
) -> None:
    lines = call(*args).out.splitlines()
    for title in numbers:
        place = next(place for place, line in enumerate(lines) if title in line)
        end = lines[place].index(title) + len(title)
        assert lines[place + 2][end - 1].isdigit()
        assert lines[place + 2][end] == " "


@pytest.mark.parametrize(("number", "text"), [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (1024, "1,024 runs")])
def test_singular_and_plural(number: int, text: str) -> None:
    assert counted(number, "run") == text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["aks", "a.txt", "b"], "'aks' is no command of 'compresskv': did you mean 'ask'?"),
        (["--budgt"], "--budgt is no option of 'compresskv': see compresskv --help"),
        (
            ["ask", "a.txt", "who", "is"],
            "'is' is too much, or belongs in quotes with what is before it: compresskv ask",
        ),
        (["eval", "-o", "run", "--limit", "0"], "--limit 0 must be at least 1"),
        (["profile", "show", "smollm2-135m", "--budget", "0"], "--budget 0 must be at least 1 token"),
        (["profile", "verify", "smollm2-135m", "--length", "1"], "--length 1 must be at least 256"),
        (["profile", "verify", "smollm2-135m", "--documents", "0"], "--documents 0 must be at least 1"),
        (["profile", "verify", "smollm2-135m", "--counts", "5,0"], "--counts 0 must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_typed_wrongly(call: Callable[..., Result], args: list[str], line: str) -> None:
    assert refused(call(*args)).startswith(line)


def started(*args: str, **options: Any) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "compresskv", *args]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("args", [["methods"], ["methods", "--json"], ["--help"], ["ask", "--help"], ["--version"]])
def test_a_full_standard_output_is_told_in_one_line(args: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        process = started(*args, stdout=full)
        _, err = process.communicate(timeout=60)
    assert err == b"compresskv: standard output cannot be written: No space left on device\n"
    assert process.returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are inherited otherwise there")
def test_a_closed_standard_output_is_told_in_one_line() -> None:
    process = started("methods", preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        2,
        b"compresskv: standard output is closed: send it to a file or to /dev/null\n",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are inherited otherwise there")
def test_a_closed_standard_error_changes_nothing_else() -> None:
    command = f"{sys.executable} -m compresskv methods --json 2>&-"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, timeout=60, check=True)
    assert done.stdout.startswith(b"[")


@pytest.mark.parametrize("module", ["typer", "rich.console", "compresskv.cli.app", "torch", "transformers"])
def test_ctrl_c_while_modules_are_imported(module: str, tmp_path: Path) -> None:
    """The interrupt comes when `module` is asked for."""
    (tmp_path / "doc.txt").write_text("text", encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code = f"""
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv = ["compresskv", "ask", "doc.txt", "What?", "--method", "full", "--model", "."]
from compresskv.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"compresskv: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX")
def test_ctrl_c_at_any_instant_and_once_more_leaves_no_traceback() -> None:
    for delay in (0.08, 0.12, 0.2):
        process = started("methods", stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        ours = re.sub(rb"(?s).*(?=File .*compresskv/cli)", b"", err)  # Python's own start is not ours to watch
        assert b"compresskv/cli" not in ours
        assert process.returncode in (0, 1, 130, -signal.SIGINT)


@pytest.mark.parametrize("words", [words for words, _ in COMMANDS], ids=NAMES)
def test_help_says_what_a_value_is_by_a_noun_in_capitals(call: Callable[..., Result], words: list[str]) -> None:
    shown = call(*words, "--help").out
    assert not re.findall(r"<\w.*?>|\{\w.*?\}", shown)  # typer's own: <str>, {document}
    usage, _, rest = shown.partition("\n\n")
    assert re.fullmatch(r"\[OPTIONS\]( \[?[A-Z]+(\.\.\.)?\]?)*", " ".join(usage.split()[2 + len(words) :]))
    (command,) = (command for own, command in COMMANDS if own == words)
    for option in (one for one in command.params if one.param_type_name == "option" and not one.is_flag):
        assert re.fullmatch("[A-Z]+|NAME=VALUE", option.metavar or ""), option.opts
        assert re.search(rf"{max(option.opts, key=len)} {option.metavar}\s", rest)


def test_the_same_option_takes_the_same_noun_in_every_command() -> None:
    nouns: dict[str, set[str]] = {}
    for _, command in COMMANDS:
        for one in command.params:
            if one.param_type_name == "option" and not one.is_flag:
                nouns.setdefault(max(one.opts, key=len), set()).add(one.metavar)
    several = {option: sorted(found) for option, found in nouns.items() if len(found) > 1}
    assert several == {
        "--budget": ["BUDGET", "TOKENS"],  # of `profile show`: a count alone
        "--layers": ["FILE", "N"],  # of `profile import`: the errors of layers
        "--output": ["FILE", "FOLDER", "PATH", "RUN"],
        "--peers": ["LIBRARIES", "PRESSES"],
        "--plot": ["FILE", "FOLDER"],
    }


def test_lists_of_commands_cut_no_sentence() -> None:
    short = {" ".join(words): command.get_short_help_str(limit=60) for words, command in COMMANDS}
    assert {words: text for words, text in short.items() if text.endswith("...") or not text.endswith(".")} == {}


BUDGETS = [(words, one) for words, command in COMMANDS for one in command.params if one.name in ("budget", "budgets")]
"""Of all commands but `profile show`, whose budget is a mean for a table."""


@pytest.mark.parametrize(("words", "option"), BUDGETS, ids=[words[0] for words, _ in BUDGETS])
def test_every_command_says_alike_what_a_budget_is(words: list[str], option: Any) -> None:
    """One token and all of the prompt, 1 and 1.0, are told apart."""
    if words == ["profile", "show"]:
        assert option.metavar == "TOKENS"
        return
    assert option.help.startswith(f"What is kept of a prompt, per layer and KV head: {TOKENS_KIND}, ")
    assert SHARE_KIND in option.help
    assert (BYTES_KIND in option.help) == (words[0] != "serve")
    assert option.metavar == option.name.upper()


def test_one_token_and_all_of_a_prompt_are_told_in_other_words() -> None:
    told = {in_words(budget) for budget in (1, 1.0, 0.01, 256, 0.5, "3MB", "5% of bytes", [3, 5])}
    assert told == {
        *("1 token", "all of the prompt", "1% of the prompt", "256 tokens", "50% of the prompt", "3MB"),
        "5% of the full cache's bytes",
        "3 to 5 tokens, by layer",
    }
    assert note_of(1, 1, 50, 0) is not None
    assert [note_of(budget, kept, 50, 8) for budget, kept in ((1.0, 50), (9, 9), (None, 50), (60, 50))] == [None] * 4
