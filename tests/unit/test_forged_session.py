"""A session's file that somebody wrote by hand, with a digest that is right, is refused in one line or read."""

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import compresskv
import tiny
from compresskv import SessionError
from compresskv.cli.session import _lines
from compresskv.sessions import file
from compresskv.sessions.file import read_session
from compresskv.sessions.header import read_facts

FORGED = [None, -1, 2**62, 2**80, 0.5, math.nan, math.inf, "x", [2**62] * 9]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A document, and a turn of a conversation."""
    session = compresskv.read(
        tiny.tiny_model("gemma3"), tiny.tokenizer(), tiny.random_words(90), method="adakv", budget=24
    )
    session.say("5 6", max_new_tokens=2, compile="never")
    session.save(place := tmp_path_factory.mktemp("written") / "talk.kvc")
    return place.read_bytes()


@pytest.fixture
def talk(written: bytes, tmp_path: Path) -> Path:
    (tmp_path / "talk.kvc").write_bytes(written)
    return tmp_path / "talk.kvc"


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: str(forged)[:12])
def test_whatever_a_forged_head_tells_it_is_refused_in_one_line_or_read(forged: Any, talk: Path) -> None:
    """With a digest that is right."""
    told, refusals = json.loads(read_head(talk)["session"]), []
    labels = [label for label, _ in _lines(read_facts(talk), 1)]
    for place in places_in(told):
        forge(talk, changed(told, place, forged))
        try:
            opened = compresskv.open_session(talk, tiny.tiny_model("gemma3"), tiny.tokenizer())
            assert [label for label, _ in _lines(opened.facts, 1)] == labels  # as `session show` prints them
        except SessionError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("\n" not in refusal and "talk.kvc" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    "tokens", [[[2**62]], [[2**80]], [[2**40, 2**40]], [[-1]], [[91, 0]], [[1.0]], [], [[91], [0]]]
)
def test_numbers_of_tokens_that_are_not_there_are_damage(tokens: Any, talk: Path) -> None:
    forge(talk, {**json.loads(read_head(talk)["session"]), "tokens": tokens})
    with pytest.raises(SessionError, match=r"^session '.*talk.kvc' is damaged: it was cut short, or altered \(.*\)$"):
        read_session(talk)


@pytest.mark.parametrize("version", [b"Infinity", b"NaN", b"null", b"[2]", b'"1e999"', b'"%s"' % (b"9" * 5000)])
def test_a_format_that_is_no_number_is_damage(version: bytes, talk: Path) -> None:
    length = int.from_bytes(talk.read_bytes()[:8], "little")
    head = talk.read_bytes()[8 : 8 + length].replace(b'"version":"3"', b'"version":' + version)
    talk.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(SessionError, match=r"^session '.*talk.kvc' is damaged: its head cannot be read$"):
        read_facts(talk)


@pytest.mark.parametrize("offsets", [b"[]", b"[0]", b"null", b'"x"', b"[0,-5]", b"[0,1e99]", b'[0,"x"]', b"[0,[1]]"])
def test_places_of_tensors_that_cannot_be_are_damage(offsets: bytes, talk: Path) -> None:
    data = talk.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = re.sub(rb'"data_offsets":\[[0-9,]*\]', b'"data_offsets":' + offsets, data[8 : 8 + length])
    talk.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    with pytest.raises(SessionError, match=r"^session '.*talk.kvc' is damaged: .*$"):
        read_facts(talk)


def test_lists_in_lists_without_end_are_damage(talk: Path) -> None:
    forge(talk, "[" * 100_000)
    with pytest.raises(SessionError, match=r"^session '.*talk.kvc' is damaged: its head cannot be read$"):
        read_session(talk)


def read_head(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()  # type: ignore[no-any-return]


def forge(path: Path, told: Any) -> None:
    """Another head, or text in its place, before the same tensors."""
    metadata, text = read_head(path), told if isinstance(told, str) else json.dumps(told)
    with safe_open(path, framework="pt") as opened:
        held = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    file.save_file(held, path, {**metadata, "session": text, "sha256": file._digest(text, held)})


def places_in(told: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each part of a head, of lists to that of the first two of each."""
    yield place
    if isinstance(told, (dict, list)):
        for name in [*told] if isinstance(told, dict) else range(min(2, len(told))):
            yield from places_in(told[name], (*place, name))


def changed(told: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = copy.copy(told)
    copied[place[0]] = changed(told[place[0]], place[1:], value)
    return copied
