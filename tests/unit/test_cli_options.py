"""How the command line's text becomes values, and how it reads a document. Nothing here loads a model."""

import io
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compresskv.cli import main, terminal
from compresskv.cli.options import parse_candidates, parse_nbytes, parse_numbers, parse_prefill_memory
from compresskv.cli.terminal import Bar, megabytes
from compresskv.errors import ConfigError
from compresskv.methods.options import parse_settings
from compresskv.selection.byte_budget import find_byte_budget


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("1024", (1024,)),
            ("1024,4096", (1024, 4096)),
            (" 1024 , 4096, ", (1024, 4096)),
        ],
    )
    def test_lists(self, text: str, numbers: tuple[int, ...]) -> None:
        assert parse_numbers("lengths", text, int) == numbers

    def test_depths_may_have_a_fraction(self) -> None:
        assert parse_numbers("depths", "12.5,50", float) == (12.5, 50.0)

    def test_an_option_that_is_not_given_stays_away(self) -> None:
        assert parse_numbers("lengths", None, int) is None

    @pytest.mark.parametrize("text", ["", ",", "abc", "1024;2048", "1024 2048", "1e3", "10.5", "1024,x", "0x10"])
    def test_what_is_no_list_of_numbers_is_told_with_option_and_value(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^lengths=") as caught:
            parse_numbers("lengths", text, int)
        assert repr(text) in str(caught.value)


class TestSettings:
    def test_numbers_of_both_kinds_and_both_spellings_of_a_name(self) -> None:
        assert parse_settings("settings", ["window_size=32", "beta=2.5", "kernel-size=7"]) == {
            "window_size": 32,
            "beta": 2.5,
            "kernel_size": 7,
        }

    def test_a_name_that_is_given_twice_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="gives beta twice"):
            parse_settings("settings", ["beta=1", "beta=2"])

    @pytest.mark.parametrize("text", ["window_size", "window_size=", "=3", "=", ""])
    def test_what_is_no_name_and_value(self, text: str) -> None:
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_settings("settings", [text])

    @pytest.mark.parametrize("text", ["window_size=many", "a=b=3", "beta=1,5"])
    def test_values_that_are_no_numbers(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not a number"):
            parse_settings("settings", [text])


class TestTerminal:
    @pytest.mark.parametrize(
        ("nbytes", "text"),
        [(0, "0.0"), (1_250_000, "1.2"), (99_949_999, "99.9"), (100_000_000, "100"), (12_345_678_901, "12,346")],
    )
    def test_megabytes(self, nbytes: int, text: str) -> None:
        assert megabytes(nbytes) == text

    def test_the_bar_is_silent_where_nobody_watches(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Bar() as bar:
            bar("reading", None)
            bar("reading", 0.5)
            bar("writing", 1.0)
            bar.stop()
            bar("after the end", 0.1)
        assert capfd.readouterr() == ("", "")


class TestLongWorkWhereNobodyWatches:
    def test_a_line_now_and_then_also_where_nothing_is_reported_for_long(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(terminal, "SILENCE_S", 0.05)
        with Bar() as bar:
            bar("measuring heads", 0.25)
            time.sleep(0.3)
            bar("measuring errors", None)
            time.sleep(0.12)
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == "measuring heads, 25% (0 s)"
        assert lines[-1] == "measuring errors (0 s)"
        assert len(lines) >= 3
        time.sleep(0.1)
        assert capfd.readouterr().err == ""

    def test_an_answer_moves_token_by_token(self) -> None:
        shown: list[tuple[str, float | None]] = []
        bar: Any = lambda message, fraction: shown.append((message, fraction))  # noqa: E731
        steps = terminal.Steps(bar, "snapkv", 4)
        steps.reading(1, 2)
        steps.answering(17)
        steps.answering(5)
        assert shown == [("snapkv: reading", 0.5), ("snapkv: answering", 0.25), ("snapkv: answering", 0.5)]


class TestProfileIsFind:
    @pytest.mark.parametrize("args", [["model"], ["./folder"], ["find", "model"], ["--quick", "model"]], ids=" ".join)
    def test_a_model_in_place_of_a_subcommand(
        self, args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Only `find` has --lengths, and refuses them before it loads the model."""
        monkeypatch.setattr(sys, "argv", ["compresskv", "profile", *args, "--lengths", "long"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr() == (
            "",
            "compresskv: --lengths 'long' is not a list of numbers separated by commas\n",
        )

    def test_a_subcommand_is_no_model(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["compresskv", "profile", "show", "nothing"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("compresskv: 'nothing' is neither a profile file nor a model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("whole", None), ("500MB", 500_000_000), ("1.5 GB", 1_500_000_000), ("800kb", 800_000)],
)
def test_the_memory_of_a_prefill(text: str, expected: int | str | None) -> None:
    assert parse_prefill_memory(text) == expected


@pytest.mark.parametrize("number", ["1", "1.", ".5", "1.25"])
@pytest.mark.parametrize("unit", ["b", "kb", "mb", "gb", "kib", "mib", "gib"])
def test_all_options_take_the_same_sizes(number: str, unit: str) -> None:
    power, base = " kmg".index(unit[0]) if unit != "b" else 0, 1024 if "i" in unit else 1000
    expected = int(Fraction(number) * base**power)
    for typed in (unit, unit.upper(), unit.capitalize(), f" {unit}", f"  {unit.replace('b', 'B')} "):
        text = number + typed
        if expected == 0:
            with pytest.raises(ConfigError, match="must be a size"):
                parse_nbytes("max_memory", text)
            with pytest.raises(ConfigError, match="must be more than 0"):
                find_byte_budget(text)
            continue
        found = find_byte_budget(text)
        assert found is not None
        assert parse_nbytes("max_memory", text) == parse_prefill_memory(text) == found.count == expected


@pytest.mark.parametrize(
    "text", ["3iB", "3XB", "-1MB", "MB", ".MB", "1e3MB", "3M", "3", pytest.param(f"{'9' * 5000}MB", id="long")]
)
def test_no_option_takes_other_sizes(text: str) -> None:
    assert find_byte_budget(text) is None
    with pytest.raises(ConfigError, match="must be a size"):
        parse_nbytes("max_memory", text)


@pytest.mark.parametrize("text", ["", "0GB", "2", "2 TB", "-1MB", "half"])
def test_no_memory_of_a_prefill(text: str) -> None:
    with pytest.raises(ConfigError, match="prefill_memory"):
        parse_prefill_memory(text)


class TestTables:
    @pytest.mark.parametrize("width", [34, 50, 61, 80, 120])
    def test_nothing_is_cut_however_narrow_the_terminal(self, width: int) -> None:
        titles = ("configuration", "score", "vs full", "vs best baseline", "retained %")
        rows = [
            ("kvpress:KVzipPress @ 12.5% (agnostic)", "80.0 [50.0, 100.0]", "-10.0", "+0.0", "26.8"),
            ("full", "90.0 [70.0, 100.0]", "", "", "100"),
        ]
        table = terminal.new_table(*titles, numbers=titles[1:])
        for row in rows:
            table.add_row(*row)
        console = Console(width=width, highlight=False, markup=False, record=True, file=io.StringIO())
        console.print(table)
        shown = console.export_text()
        assert all(len(line) <= width for line in shown.splitlines())
        characters = Counter("".join(text for words in (titles, *rows) for text in words))
        assert Counter(shown.replace("─", "").replace("\n", "")) - Counter(" " * len(shown)) == characters - Counter(
            " " * len(shown)
        )

    def test_names_and_intervals_are_broken_between_words_where_that_is_enough(self) -> None:
        table = terminal.new_table("configuration", "score", "vs best", numbers=("score", "vs best"))
        table.add_row("snapkv[window_size=32, kernel_size=15] @ 64", "58.3 [33.3, 100.0]", "+0.0")
        console = Console(width=48, highlight=False, markup=False, record=True, file=io.StringIO())
        console.print(table)
        lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
        assert lines[-2:] == [
            ["snapkv[window_size=32,", "58.3", "[33.3,", "+0.0"],
            ["kernel_size=15]", "@", "64", "100.0]"],
        ]


def test_candidates() -> None:
    assert [parse_candidates(text) for text in ("1", "16", "all")] == [1, 16, None]
    for text in ("0", "-1", "4.0", "none", ""):
        with pytest.raises(ConfigError, match="candidates"):
            parse_candidates(text)
