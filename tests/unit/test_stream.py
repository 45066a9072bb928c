"""An answer's line ends, however the answer does."""

import pytest

from compresskv.cli.terminal import Bar, Stream


def interrupted(text: str) -> None:
    with Bar() as bar, Stream(bar) as stream:
        stream(text)
        raise KeyboardInterrupt


def test_an_interrupted_answer_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted("The crew")
    assert capsys.readouterr().out == "The crew\n"


def test_nothing_said_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar, Stream(bar):
        pass
    assert not capsys.readouterr().out
