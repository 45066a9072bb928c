"""A session's file tells what it is, keeps what it was given, and a damaged one is refused in one line."""

import json
import math
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

import compresskv
import tiny
from compresskv import Session, SessionError
from compresskv.cache.state import cache_state
from compresskv.sessions import file
from compresskv.sessions.file import Contents, Said, read_session, write_session
from compresskv.sessions.header import is_cut, is_session, read_facts, read_metadata, turns_of
from compresskv.sessions.integers import pack, unpack
from compresskv.sessions.repeated import NEW, join, part
from compresskv.sessions.turn import Turn


@pytest.fixture(scope="module")
def session() -> Session:
    return compresskv.read(
        tiny.tiny_model("gemma3"), tiny.tokenizer(), tiny.random_words(90), method="adakv", budget=24
    )


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Path:
    session.save(tmp_path / "saved.kvc")
    return tmp_path / "saved.kvc"


def test_integers_come_back_and_take_little_room() -> None:
    positions = torch.sort(torch.randperm(4000)[:600]).values.expand(1, 3, -1)
    tensors = [positions, torch.tensor([True, False]), torch.tensor(-7), torch.empty(0, 3, dtype=torch.int64)]
    packed, shapes = pack(tensors)
    assert packed.dtype == torch.uint8
    assert len(packed) < positions.numel()
    assert all(torch.equal(*pair) for pair in zip(unpack(packed, shapes), tensors, strict=True))
    big = torch.tensor([2**62, -(2**62), 0])
    assert torch.equal(unpack(*pack([big]))[0], big)
    with pytest.raises(ValueError, match="numbers"):
        unpack(packed, [*shapes, [1]])
    with pytest.raises(ValueError, match="numbers"):
        unpack(packed[:-3], shapes)


def test_the_head_tells_what_it_is_without_pytorch(saved: Path, session: Session) -> None:
    assert read_facts(saved) == session.facts
    code = (
        "import sys; from compresskv.sessions.header import read_facts; "
        f"print(read_facts({str(saved)!r}).method, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["adakv", "False"]


def test_it_names_the_release_that_runs_be_another_installed(session: Session) -> None:
    plan = compresskv.make_plan(tiny.tiny_model("llama"), [1, 2, 3], "full", 1)
    for versions in (session.facts.versions, plan.versions):
        assert versions["compresskv"] == compresskv.__version__
        assert set(versions) == {"compresskv", "torch", "transformers"}


def test_only_sessions_are_taken_for_sessions(saved: Path, tmp_path: Path) -> None:
    assert is_session(saved)
    text = tmp_path / "text.kvc"
    for data in (b"", b"A text.", b'{"__metadata__":{"format":"compresskv-session"}}'):
        text.write_bytes(data)
        assert not is_session(text)
        with pytest.raises(SessionError, match="is not a session: make one with `compresskv read`"):
            read_facts(text)
        assert not is_cut(text)
    for length in (8, 9, 40):
        text.write_bytes(saved.read_bytes()[:length])
        assert not is_session(text)
        assert is_cut(text)
        with pytest.raises(SessionError, match="is damaged: its head was cut short"):
            read_facts(text)
    assert not is_session(tmp_path)
    assert not is_session(tmp_path / "none")
    with pytest.raises(SessionError, match="none': No such file or directory"):
        read_facts(tmp_path / "none")


def test_any_damage_is_refused_in_one_line(saved: Path) -> None:
    model, tokenizer, data = tiny.tiny_model("gemma3"), tiny.tokenizer(), saved.read_bytes()
    compresskv.open_session(saved, model, tokenizer)
    length = int.from_bytes(data[:8], "little")
    places = [60, length // 2, length + 4, length + 3000, len(data) - 1]
    altered = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in places]
    for damaged in (*altered, data[:-1], data[: length + 100], data[: length // 2], data + b"x"):
        saved.write_bytes(damaged)
        with pytest.raises(SessionError) as refused:
            compresskv.open_session(saved, model, tokenizer)
        assert "\n" not in str(refused.value)
        assert "saved.kvc" in str(refused.value)


def test_a_newer_format_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    assert data.count(b'"version":"3"') == 1
    saved.write_bytes(data.replace(b'"version":"3"', b'"version":"4"'))
    with pytest.raises(SessionError, match="is of format 4, this release reads 3: read the document again"):
        compresskv.open_session(saved, tiny.tiny_model("gemma3"), tiny.tokenizer())


def test_a_fact_of_another_kind_is_named(saved: Path) -> None:
    data = saved.read_bytes()
    assert data.count(rb"\"method\":") == 1
    saved.write_bytes(data.replace(rb"\"method\":", rb"\"methox\":"))  # as long as before: the head's length stays
    with pytest.raises(SessionError, match=r"saved.kvc' is damaged: in its head, field 'method' is missing$"):
        read_facts(saved)


def test_it_is_plain_safetensors_that_holds_the_text(saved: Path, session: Session) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["session"])
    assert told["facts"]["num_tokens"] == len(session.token_ids)
    assert tiny.tokenizer().decode(session.token_ids).split()[1:] == tiny.random_words(90).split()


def test_a_conversation_may_lie_in_its_documents_tensors(session: Session, tmp_path: Path) -> None:
    tensors = {"0.keys": torch.arange(12.0).reshape(1, 1, 4, 3)[:, :, :2]}
    said = Said(({"0.keys": torch.as_strided(tensors["0.keys"], (1, 1, 4, 3), (12, 12, 3, 1))}, []), (Turn(1, 2),), [5])
    contents = Contents(session.facts, session.token_ids, session._document.ending, (tensors, []), said)
    write_session(tmp_path / "saved.kvc", contents)
    found = read_session(tmp_path / "saved.kvc")
    assert found.said is not None
    assert torch.equal(found.said.state[0]["0.keys"], said.state[0]["0.keys"])
    assert torch.equal(found.state[0]["0.keys"], tensors["0.keys"])


@pytest.mark.parametrize(("method", "store"), [("full", "native"), ("adakv", "native"), ("snapkv", "int8")])
def test_a_conversation_is_held_beside_its_document_not_with_it(method: str, store: str, tmp_path: Path) -> None:
    model, words = tiny.tiny_model("gemma3"), tiny.random_words(240)
    session = compresskv.read(model, tiny.tokenizer(), words, method=method, store=store, budget=0.8)
    session.save(tmp_path / "before.kvc")
    session.say(tiny.random_words(8), max_new_tokens=4, compile="never")
    session.save(tmp_path / "saved.kvc")
    before, after = ((tmp_path / name).stat().st_size for name in ("before.kvc", "saved.kvc"))
    version = 3 if store != "native" else 2 if method == "full" else 1  # where every file has a budget
    assert f'"version":"{version}"'.encode() in (tmp_path / "before.kvc").read_bytes()
    assert 1.02 * before < after < 1.5 * before  # new tokens of a packed store are not packed yet
    assert session._conversation is not None
    found, (expected, _) = read_session(tmp_path / "saved.kvc").said, cache_state(session._conversation.cache)
    assert found is not None
    assert set(found.state[0]) == set(expected)
    assert all(torch.equal(found.state[0][name], tensor) for name, tensor in expected.items())


def test_a_file_of_the_first_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a conversation is whole, and what was said in it is not told."""
    words = tiny.random_words(90)
    session = compresskv.read(tiny.tiny_model("gemma3"), tiny.tokenizer(), words, budget=24, store="native")
    for question in ("What?", "Who?"):
        session.say(question, max_new_tokens=4, compile="never")
    session.save(tmp_path / "new.kvc")
    first = SimpleNamespace(dumps=lambda told: json.dumps(_without_turns(told)))
    for name, value in {"CONVERSATION_VERSION": 1, "part": lambda *_: None, "json": first}.items():
        monkeypatch.setattr(file, name, value)
    session.save(tmp_path / "old.kvc")
    session.forget()
    monkeypatch.undo()
    assert b'"version":"1"' in (tmp_path / "old.kvc").read_bytes()
    assert b'"version":"2"' in (tmp_path / "new.kvc").read_bytes()
    old, new = (read_session(tmp_path / name).said for name in ("old.kvc", "new.kvc"))
    assert old is not None
    assert new is not None
    assert (old.answer, old.state[1]) == (new.answer, new.state[1])
    first_turn, last_turn = new.turns
    assert old.turns == (
        replace(first_turn, question=None, answer=None),
        replace(last_turn, question=None, answer=None, num_tokens=None),
    )
    opened = compresskv.open_session(tmp_path / "old.kvc", tiny.tiny_model("gemma3"), tiny.tokenizer())
    assert [turn.num_tokens for turn in opened.turns] == [turn.num_tokens for turn in new.turns]
    assert all(torch.equal(old.state[0][name], tensor) for name, tensor in new.state[0].items())


def _without_turns(told: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in told.items() if name != "turns"}
    return {**kept, "said": told["said"][:3]}


def test_turns_that_are_none_are_refused_in_one_line(session: Session, tmp_path: Path) -> None:
    session.say("What?", max_new_tokens=4, compile="never")
    session.save(tmp_path / "talk.kvc")
    session.forget()
    metadata = read_metadata(tmp_path / "talk.kvc")
    assert [turn.question for turn in turns_of("talk.kvc", metadata)] == ["What?"]
    untold = {name: value for name, value in metadata.items() if name != "turns"}
    for damaged in (
        {**metadata, "turns": [{"number": 1}]},
        {**untold, "said": []},
        {**untold, "said": [[], ["x"], []]},
    ):
        with pytest.raises(SessionError, match=r"^session 'talk.kvc' is damaged: in its head, of its turns, .*$"):
            turns_of("talk.kvc", damaged)


class TestRepeated:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
    @pytest.mark.parametrize("width", [4, 5, 64])
    def test_rows_are_found_wherever_they_lie(self, dtype: torch.dtype, width: int) -> None:
        generator = torch.Generator().manual_seed(1)
        other = torch.randint(0, 200, (1, 2, 50, width), generator=generator).to(dtype)
        new = torch.randint(200, 250, (1, 2, 7, width), generator=generator).to(dtype)
        other[:, :, 3] = other[:, :, 4]  # alike
        own = torch.cat([other[:, :, 10:], new, other[:, :, :4]], dim=2)
        parted = part(own, other)
        assert parted is not None
        sources, rest = parted
        assert rest.equal(new.reshape(-1, width))
        assert (sources == NEW).sum() == 14
        assert join(sources, rest, other, list(own.shape)).equal(own)

    def test_bytes_count_not_numbers(self) -> None:
        other = torch.tensor([[0.0, 1.0], [math.nan, 2.0]])
        parted = part(torch.tensor([[-0.0, 1.0], [math.nan, 2.0]]), other)
        assert parted is not None
        assert parted[0].tolist() == [NEW, 1]

    @pytest.mark.parametrize(
        ("own", "other"),
        [
            (torch.ones(2, 4), torch.ones(2, 5)),
            (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.float64)),
            (torch.ones(4), torch.ones(4)),
            (torch.ones(2, 0), torch.ones(2, 0)),
            (torch.ones(0, 4), torch.ones(2, 4)),
            (torch.ones(2, 4), torch.ones(0, 4)),
            (torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.uint8)),
        ],
    )
    def test_what_has_no_rows_alike_in_kind(self, own: torch.Tensor, other: torch.Tensor) -> None:
        assert part(own, other) is None

    @pytest.mark.parametrize(("sources", "num_new"), [([0, 9], 0), ([-2, 0], 0), ([NEW, 0], 0), ([1, 0], 1), ([1], 0)])
    def test_what_does_not_fit_is_refused(self, sources: list[int], num_new: int) -> None:
        with pytest.raises(ValueError, match="is not there"):
            join(torch.tensor(sources), torch.ones(num_new, 2), torch.ones(3, 2), [2, 2])


def test_a_pipe_stays_one_and_gets_the_file(session: Session, tmp_path: Path, saved: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    session.save(pipe)
    reader.join(timeout=60)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "got.kvc").write_bytes(got[0])
    assert read_session(tmp_path / "got.kvc").token_ids == read_session(saved).token_ids


def test_a_failed_save_leaves_what_was_there(saved: Path, session: Session, tmp_path: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(SessionError, match=r"cannot write the session to .*: No such file or directory"):
        session.save(tmp_path / "no" / "folder.kvc")
    saved.chmod(0o400)
    session.save(tmp_path / "other.kvc")
    assert saved.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.kvc", "saved.kvc"]


def test_an_interrupted_save_leaves_no_half_file(
    saved: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, save_file = saved.read_bytes(), file.save_file

    def interrupt(*args: Any) -> None:
        save_file(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(file, "save_file", interrupt)
    for place in (saved, tmp_path / "new.kvc"):
        with pytest.raises(KeyboardInterrupt):
            session.save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.kvc"]
    assert saved.read_bytes() == before
