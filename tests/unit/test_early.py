"""What can be checked without the model is refused before one is loaded: here loading any is an error of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compresskv
import compresskv.bench.subject
import compresskv.models.load
import tiny
from commands import Result, commands, runner

ASK = ["ask", "doc.txt", "Who?"]
CUT = [*ASK, "--method", "snapkv"]
EXPLAIN = ["explain", "doc.txt", "Who?"]
EVAL = ["eval", "-o", "run"]
FIND = ["profile", "find", "smollm2-135m"]
UTF_16 = (
    "seems to be UTF-16LE without the mark that says so: convert it with "
    "`iconv -f UTF-16LE -t UTF-8 utf-16.txt > converted.txt`\n"
)
READ = ["read", "doc.txt"]
CHAT = ["chat", "doc.txt"]
VERIFY = ["profile", "verify", "smollm2-135m"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(compresskv.models.load, "load", load)
    monkeypatch.setattr(compresskv.bench.subject, "load", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "doc.txt").write_text("Some text.", encoding="utf-8")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "bin.pdf").write_bytes(b"%PDF\0\1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("\xe9".encode("latin-1"))
    (tmp_path / "utf-16.txt").write_bytes("Some text.".encode("utf-16-le"))
    return runner(monkeypatch, capfd, columns=80)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([*ASK, "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        ([*ASK, "--budget", "0"], "--budget '0' must be at least 1 token"),
        (
            [*ASK, "--method", "snapkv,full"],
            "--method 'snapkv,full' names 2 methods: give one, and the others as --comp",
        ),
        ([*ASK, "--method", "snapkw"], "--method 'snapkw' is unknown: did you mean 'snapkv'?"),
        ([*ASK, "--compare", "full,snapkw"], "--compare 'snapkw' is unknown: did you mean 'snapkv'?"),
        ([*ASK, "--compare", "snapkv[beta=1]"], "--compare 'snapkv[beta=1]': beta=1 is no option of method 'snapkv'"),
        ([*ASK, "--set", "beta=x"], "--set 'beta=x': 'x' is not a number, true or false"),
        ([*ASK, "--set", "profile=3"], "--set 'profile=3' is no option of method 'blend'"),
        ([*ASK, "--method", "snapkv", "--set", "kernel_size=4"], "--set 'kernel_size=4' must be an odd number of at"),
        ([*ASK, "--profile", "none.json"], "--profile 'none.json' cannot be read: no such file"),
        ([*ASK, "--profile", "bad.json"], "--profile 'bad.json' is no profile"),
        ([*ASK, "--compile", "maybe"], "--compile 'maybe' is unknown"),
        ([*ASK, "--truncate", "end"], "--truncate 'end' is unknown: choose from never, middle"),
        ([*ASK, "--save-plan", "no/such/plan.json"], "--save-plan 'no/such/plan.json' cannot be written"),
        ([*CUT, "--decode-method", "nosuch"], "--decode-method 'nosuch' is of no use without --decode-budget N"),
        ([*CUT, "--decode-interval", "5"], "--decode-interval 5 is of no use without --decode-budget N"),
        ([*CUT, "--chunk-tokens", "0"], "--chunk-tokens 0 is of no use without --chunk-budget N"),
        ([*CUT, "--chunk-budget", "-3"], "--chunk-budget -3 must be an int of at least 1"),
        ([*CUT, "--chunk-budget", "9", "--chunk-tokens", "0"], "--chunk-tokens 0 must be an int of at least 1"),
        ([*CUT, "--decode-budget", "20", "--decode-method", "nosuch"], "--decode-method 'nosuch' is unknown"),
        (
            [*CUT, "--decode-budget", "20", "--decode-method", "rkv,knorm"],
            "--decode-method 'rkv,knorm' names 2 methods",
        ),
        ([*CUT, "--decode-budget", "20", "--decode-method", "kvzip"], "--decode-method 'kvzip' must see all tokens"),
        ([*CUT, "--decode-budget", "20", "--decode-interval", "1"], "--decode-interval 1 must be at least"),
        (
            [*ASK, "--budget", "auto", "--chunk-budget", "300"],
            "--budget 'auto' is chosen once the whole prompt was read: leave out --chunk-budget N",
        ),
        ([*CUT, "--chunk-budget", "255"], "--chunk-budget 255 is below --budget 256: what is to stay in the end must"),
        (
            [*ASK, "--method", "full", "--chunk-budget", "300"],
            "--chunk-budget 300 cuts a prompt while it is read, but method 'full' keeps all of it: use another method",
        ),
        ([*CUT, "--two-pass", "--chunk-budget", "300"], "--chunk-budget 300 cuts a prompt while it is read, and this"),
        ([*ASK, "--method", "kvzip", "--chunk-budget", "30"], "--chunk-budget 30 cuts a prompt while it is read"),
        (
            [*CUT, "--compare", "kvzip", "--chunk-budget", "300"],
            "--chunk-budget 300 cuts a prompt while it is read, but",
        ),
        ([*EXPLAIN, "--max-new-tokens", "-1"], "--max-new-tokens -1 must be at least 0"),
        ([*EXPLAIN, "--evidence", "a lie"], "--evidence 'a lie' does not occur in the document"),
        ([*EXPLAIN, "--chunk-budget", "99"], "--chunk-budget 99 is below --budget 256: "),
        ([*EXPLAIN, "--chunk-tokens", "9"], "--chunk-tokens 9 is of no use without --chunk-budget N"),
        ([*EXPLAIN, "--candidates", "0"], "--candidates '0' must be a whole number of at least 1, or 'all'"),
        ([*EXPLAIN, "--html", "."], "--html '.' is a folder"),
        ([*EXPLAIN, "--html", "/proc/page.html"], "--html '/proc/page.html'"),
        ([*EVAL, "--lengths", "0"], "--lengths 0 must be at least 1"),
        ([*EVAL, "--lengths", "many"], "--lengths 'many' is not a list of numbers"),
        ([*EVAL, "--depths", "101"], "--depths 101.0 is no percentage: choose from 0 to 100"),
        ([*EVAL, "--haystack", "none.txt"], "--haystack 'none.txt': no such file or folder"),
        ([*EVAL, "--tasks", "longbench"], "--data: task 'longbench' needs a folder with "),
        ([*EVAL, "--tasks", "longbench", "--data", "none"], "--data 'none': no such folder"),
        ([*EVAL, "--profile", "none.json"], "--profile 'none.json' cannot be read: no such file"),
        ([*EVAL, "--haystack", "file"], "--haystack file holds no text"),
        ([*EVAL, "--haystack", "folder"], "--haystack folder holds no text"),
        ([*EVAL, "--haystack", "bin.pdf"], "--haystack 'bin.pdf' is binary"),
        ([*EVAL, "--rows", "0"], "--rows '0' is no case of any subset"),
        ([*EVAL, "--rows", "5:3"], "--rows '5:3' is no case of any subset"),
        ([*EVAL, "-o", "doc.txt"], "--output 'doc.txt' cannot be a folder: Not a directory"),
        ([*EVAL, "-o", "doc.txt/run"], "--output 'doc.txt/run' cannot be a folder: Not a directory"),
        ([*EVAL, "-o", "/proc/x"], "--output '/proc/x' cannot be a folder: "),
        (
            [*EVAL, "--tasks", "questions", "--methods", "snapkv[lookahead=2]"],
            "--methods 'snapkv[lookahead=2]' looks ahead, which in the setting 'agnostic'",
        ),
        ([*EVAL, "--limit", "0"], "--limit 0 must be at least 1"),
        ([*FIND, "--lengths", "100"], "--lengths 100 must be whole numbers of at least 256 tokens"),
        ([*FIND, "--depths", "101"], "--depths 101.0 must lie between 0 and 100 percent"),
        ([*FIND, "--haystack", "none.txt"], "--haystack 'none.txt': No such file or directory"),
        ([*FIND, "--needles", "none.json"], "--needles 'none.json': No such file or directory"),
        ([*FIND, "--needles", "bad.json"], "--needles 'bad.json' is no "),
        ([*FIND, "--output", "file/x.json"], "--output 'file/x.json' cannot be written"),
        ([*VERIFY, "none.json"], "profile 'none.json' cannot be read: no such file"),
        ([*VERIFY, "--counts", "0"], "--counts 0 must be at least 1"),
        ([*VERIFY, "--haystack", "none.txt"], "--haystack 'none.txt': No such file or directory"),
        ([*VERIFY, "--plot", "file"], "--plot 'file' cannot be a folder"),
        *(
            pair
            for command in (READ, CHAT)
            for pair in (
                ([*command, "--profile", "none.json"], "--profile 'none.json' cannot be read: no such file"),
                ([*command, "--profile", "bad.json"], "--profile 'bad.json' is no profile"),
                ([*command, "--method", "adakv,snapkv"], "--method 'adakv,snapkv' names 2 methods: give one\n"),
                ([*command, "--method", "snapkv[lookahead=2]"], "--method 'snapkv[lookahead=2]' looks ahead, but"),
                ([*command, "--max-memory", "much"], "--max-memory 'much'"),
                ([*command, "--set", "kernel_size=3"], "--set 'kernel_size=3' is an option of a method: name that"),
                ([*command, "--method", "snapkv", "--set", "kernel_size=4"], "--set 'kernel_size=4' must be an odd"),
                ([*command, "--store", "int5"], "--store 'int5' is unknown"),
                ([*command, "--chunk", "0"], "--chunk 0 must be at least 1"),
            )
        ),
        (["bench", "--lengths", "0"], "--lengths 0 must be at least 1"),
        (["bench", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["bench", "--decode", "quick"], "--decode 'quick' is unknown"),
        (["bench", "--output", "file/x.json"], "--output 'file/x.json' cannot be written"),
        (["bench", "--methods", "snapkv[lookahead=2]"], "--methods 'snapkv[lookahead=2]' looks ahead"),
        (["bench", "--methods", "kvzip"], "--methods 'kvzip' reads the prompt twice, which is not measured here"),
        (["bench", "--profile", "none.json"], "--profile 'none.json' cannot be read: no such file"),
        (["compile", "--profile", "none.json"], "--profile 'none.json' cannot be read: no such file"),
        (["compile", "--method", "kvzip"], "--method 'kvzip' reads the prompt twice, which is not measured here"),
        (["compile", "--method", "snapkv[lookahead=2]"], "--method 'snapkv[lookahead=2]' looks ahead"),
        (["compile", "--method", "adakv,snapkv"], "--method 'adakv,snapkv' names 2 methods: give one\n"),
        ([*CUT, "--method", "snapkv[window_size]"], "--method 'snapkv[window_size]': 'window_size' is not NAME=VALUE,"),
        ([*CUT, "--compare", "snapkv[window_size=x]"], "--compare 'snapkv[window_size=x]': 'window_size=x': 'x' is"),
        ([*ASK, "--profile", "bin.pdf"], "--profile 'bin.pdf' is not JSON: "),
        ([*CUT, "--set", "window_size=8", "--set", "window-size=9"], "--set 'window-size=9' gives window_size twice"),
        (
            [*ASK, "--method", "snapkv[window_size=8,window_size=9]"],
            "--method 'snapkv[window_size=8,window_size=9]': 'w",
        ),
        ([*CUT, "--decode-budget", "64", "--decode-method", "full"], "--decode-method 'full' keeps every token: use"),
        ([*EXPLAIN, "--html", "page.pdf"], "--html 'page.pdf': a page is HTML; end its name with .html"),
        ([*EXPLAIN, "--no-answer", "--max-new-tokens", "9"], "--max-new-tokens 9 is of no use with --no-answer: leave"),
        (["ask", " ", "Who?"], "document ' ' names no file"),
        ([*READ, "-o", " "], "--output ' ' is empty: name a file or a folder"),
        ([*READ, "-o", "doc.txt/x.kvc"], "--output 'doc.txt/x.kvc' cannot be written: Not a directory"),
        ([*EVAL, "--methods", ""], "--methods '' is not NAME or NAME[option=value,...]"),
        ([*VERIFY, "--plot", "file/in"], "--plot 'file/in' cannot be a folder: Not a directory"),
        ([*ASK, "--profile", "latin.txt"], "--profile 'latin.txt' is not JSON: it is no text in UTF-8\n"),
        (["ask", "utf-16.txt", "Who?"], "document 'utf-16.txt' " + UTF_16),
        (["bench", "--budgets", "auto"], "--budgets 'auto' depends on each prompt"),
        ([*READ, "--budget", "auto"], "--budget 'auto' depends on each prompt"),
        ([*CUT, "--budget", "auto"], "--budget 'auto' needs a method whose loss can be predicted"),
        ([*CUT, "--budget", "auto[max_loss=0.2]"], "--budget 'auto[max_loss=0.2]' needs a method whose loss"),
        (
            ["profile", "import", "--published", "Llama-3.1-8B-Instruct", "--folder", "folder"],
            "--folder 'folder': 'folder/Llama-3.1-8B-Instruct_head_idx.json': No such file or directory\n",
        ),
        (["report", "run", "-o", "doc.txt"], "--output 'doc.txt' cannot be a folder: Not a directory\n"),
        (["report", "run", "--own", ""], "--own '' names no method"),
        (["report", "run", "--own", " ,"], "--own ' ,' names no method"),
        (["compile", "--method", "snapkw"], "--method 'snapkw' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_model_is_loaded_for_what_cannot_work(call: Callable[..., Result], args: list[str], line: str) -> None:
    result = call(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"compresskv: {line}")
    assert result.err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (ASK, "--budget"),
        ([*ASK, "--budget", "auto"], "--max-budget"),
        (EXPLAIN, "--budget"),
        (READ, "--budget"),
        (["chat", "doc.txt"], "--budget"),
        ([*EVAL, "--methods", "blend"], "--budgets"),
        (["bench"], "--budgets"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
@pytest.mark.parametrize(("kind", "one"), [("auto", "auto"), ("bytes in all layers", "3MB")])
def test_what_an_error_offers_as_budget_is_taken(
    call: Callable[..., Result], args: list[str], option: str, kind: str, one: str
) -> None:
    offered = kind in call(*args, option, "nosuch").err
    later = "--profile 'none.json' cannot be read"
    error = call(*args, option, one, "--profile", "none.json").err
    assert offered == (later in error), error


@pytest.fixture(scope="module")
def session() -> compresskv.Session:
    return compresskv.read(tiny.tiny_model("llama"), tiny.tokenizer(), tiny.random_words(60), method="full")


@pytest.mark.parametrize("command", ["ask", "explain", "chat"])
def test_what_is_typed_beside_a_session_is_refused_though_it_is_the_default(
    call: Callable[..., Result], session: compresskv.Session, command: str
) -> None:
    session.save("kept.kvc")
    own = {"--model", "--max-new-tokens", "--dtype", "--device", "--compile", "--html", "--evidence"}
    words = [command, "kept.kvc", *(["Who?"] if command != "chat" else [])]
    (parsed,) = (one for name, one in commands() if name == [command])
    for one in parsed.params:
        option = max(one.opts, key=len)
        if one.param_type_name == "argument" or option in own or one.is_flag:
            continue
        typed = "256" if one.default is None or not str(one.default) else str(one.default)
        result = call(*words, option, typed)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), option
        assert f"{option} " in result.err
        assert " has no place here: a session was read and cut before" in result.err


@pytest.mark.parametrize("command", ["ask kept.kvc Who?", "explain kept.kvc Who?", "chat kept.kvc"])
def test_no_model_is_loaded_for_a_session_that_cannot_work(
    call: Callable[..., Result], session: compresskv.Session, command: str
) -> None:
    session.save("kept.kvc")

    def refused(*args: str) -> str:
        result = call(*command.split(), *args)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        return result.err

    assert refused("--dtype", "float16").startswith(
        "compresskv: --dtype 'float16' is not what this session was read in: leave it out for float32"
    )
    assert "--profile 'bad.json' has no place here" in refused("--profile", "bad.json")
    assert "--set window_size=3 has no place here" in refused("--set", "window_size=3")
    whole = Path("kept.kvc").read_bytes()
    Path("kept.kvc").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged" in refused()
    Path("kept.kvc").write_bytes(whole[:-9])
    assert "is damaged" in refused()
