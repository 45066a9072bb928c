"""What is read once answers any number of questions as if each were the first, before it is saved and after."""

import gc
import hashlib
import os
import stat
import threading
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compresskv
import shrunk
import tiny
from compresskv import (
    CacheStateError,
    CompressedCache,
    ConfigError,
    ModelError,
    ProfileError,
    PromptError,
    Session,
    SessionError,
)
from compresskv.attention.routing import routing
from compresskv.cache.stores.packed import TAIL
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.compiled import decoding
from compresskv.methods import registry
from compresskv.models.shape import compressible_layers
from compresskv.profiles.store import default_path, write_profile
from compresskv.prompts.prompt import build_prompt
from compresskv.prompts.turns import question_tokens
from oracle import evictions, oracle_logits

NUM_WORDS = 90
BUDGETS: list[Any] = [24, 0.4, [20, 40, 24, 28, 80, 22]]
FAMILIES = [*tiny.FAMILIES, "gemma2", "gpt_oss"]
SHORT_WORDS = "5 9 12 "
"""Tokens that all models of `shrunk` know."""
QUESTIONS = ["75 14 22 9 64 29 38", "41 7 90"]


def read(
    model: PreTrainedModel, method: str = "adakv", budget: Any = 24, store: str | None = "native", **options: Any
) -> Session:
    if isinstance(budget, list):
        budget = budget[: len(compressible_layers(model))]
    options |= tiny.options_for(model, method)
    return compresskv.read(
        model, tiny.tokenizer(), tiny.random_words(NUM_WORDS), method=method, budget=budget, store=store, **options
    )


def answers(session: Session, max_new_tokens: int = 8) -> list[list[int]]:
    return [session.ask(question, max_new_tokens=max_new_tokens, compile="never").token_ids for question in QUESTIONS]


def logits(session: Session) -> Tensor:
    """What the model says after some more tokens, and after one of them."""
    document, more = torch.tensor([session.token_ids]), tiny.random_tokens(5, seed=8)
    with session._lending() as lent, routing(session._model):
        return tiny.read(session._model, lent.branch(5), torch.cat([document, more], dim=1), [4, 1])


def digest(session: Session) -> str:
    """Of all that is kept of the document."""
    found = hashlib.sha256()
    for layer in session.cache.compressed_layers:
        assert layer.store is not None
        for keys, values in layer.store.heads():
            for states in (keys, values):
                found.update(states.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def places(session: Session) -> list[int]:
    return [tensor.data_ptr() for layer in session.cache.compressed_layers for tensor in layer.tensors]


def kept_by_head(session: Session) -> list[list[int]]:
    return [head for layer in kept(session) for head in layer[0]]


def kept(session: Session) -> list[Any]:
    return [tiny.kept_tokens(layer) for layer in session.cache.compressed_layers]


@pytest.mark.stores(reason="a file names the stores that users have")
@pytest.mark.parametrize("budget", [*BUDGETS, "20% of bytes"], ids=str)
@pytest.mark.parametrize("method", registry.methods())
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_session_goes_on_bit_for_bit_as_before(
    family: str, store: str, method: str, budget: Any, tmp_path: Path
) -> None:
    model = tiny.tiny_model(family, "eager" if family in ("gpt_oss", "gemma2") else "sdpa")
    check_goes_on(read(model, method, budget, store=store), tmp_path)


@pytest.mark.stores(reason="a file names the stores that users have")
@pytest.mark.parametrize("method", ["kvzip", "adakv"])
@pytest.mark.parametrize("store", tiny.STORES)
def test_a_saved_session_in_half_precision_goes_on_bit_for_bit_too(store: str, method: str, tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", dtype=torch.bfloat16)
    check_goes_on(read(model, method, store=store), tmp_path)


def check_goes_on(session: Session, tmp_path: Path) -> None:
    expected = logits(session)
    session.save(tmp_path / "saved.kvc")
    opened = compresskv.open_session(tmp_path / "saved.kvc", session._model, tiny.tokenizer())
    assert torch.equal(logits(opened), expected)
    assert opened.facts == session.facts
    assert kept(opened) == kept(session)
    assert digest(opened) == digest(session)


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "gemma3n_text"])
def test_layers_of_other_kinds_are_kept_shared_and_saved_too(model_type: str, tmp_path: Path) -> None:
    model = shrunk.build(model_type)
    try:
        session = compresskv.read(model, tiny.tokenizer(), SHORT_WORDS * 30, method="adakv", budget=24)
    except ModelError as error:
        pytest.skip(f"not with this transformers: {error}")
    expected = answers(session)
    session.say(SHORT_WORDS, max_new_tokens=3, compile="never")
    session.save(tmp_path / "saved.kvc")
    opened = compresskv.open_session(tmp_path / "saved.kvc", model, tiny.tokenizer())
    found, wanted = (one.say(SHORT_WORDS, max_new_tokens=3, compile="never").token_ids for one in (opened, session))
    assert found == wanted
    assert answers(opened) == answers(session) == expected
    for one in (session, opened):
        one.forget()
        one.append(SHORT_WORDS)
    assert answers(opened) == answers(session)


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_question_sees_what_it_would_see_alone(family: str, method: str) -> None:
    model, tokenizer, document = tiny.tiny_model(family), tiny.tokenizer(), tiny.random_words(NUM_WORDS)
    session = read(model, method)
    for question in (*QUESTIONS, *QUESTIONS):
        whole = build_prompt(tokenizer, document, question).input_ids
        num_document = len(session.token_ids)
        with compresskv.compressing(model, method, 24) as cache:
            wanted = tiny.read(model, cache, whole, [num_document, whole.shape[1] - num_document])[0, -1].argmax()
        assert whole[0, :num_document].tolist() == session.token_ids
        assert session.ask(question, max_new_tokens=1).token_ids == [int(wanted)]


@pytest.mark.parametrize("store", ["native", "int4"])
@pytest.mark.parametrize(("family", "method"), [("llama", "snapkv"), ("gemma3", "adakv")])
def test_many_questions_neither_copy_nor_change_the_document_and_leak_nothing(
    family: str, method: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches, branch = weakref.WeakSet[CompressedCache](), CompressedCache.branch

    def noted(cache: CompressedCache, room: int | None) -> CompressedCache:
        branches.add(branched := branch(cache, room))
        return branched

    monkeypatch.setattr(CompressedCache, "branch", noted)
    session = read(tiny.tiny_model(family), method, store=store)
    before, first = digest(session), answers(session)
    at, nbytes = places(session), session.nbytes
    for number in range(8):
        session.ask(tiny.random_words(1 + number % 7, seed=number), max_new_tokens=1 + number % 8, compile="never")
        assert places(session) == at
    assert session.nbytes == nbytes
    assert digest(session) == before
    assert answers(session) == first
    gc.collect()
    assert not branches


@pytest.mark.stores("ragged", reason="no compiled step writes to the naive store")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("store", ["native", "int4", "int2"])
@pytest.mark.parametrize(("family", "method"), [("llama", "snapkv"), ("gemma3", "snapkv"), ("llama", "adakv")])
def test_compiled_steps_write_behind_the_document_too(family: str, method: str, store: str) -> None:
    session = read(tiny.tiny_model(family), method, store=store)
    expected, before = answers(session), digest(session)
    for _ in range(2):
        for question, wanted in zip(QUESTIONS, expected, strict=True):
            found = session.ask(question, max_new_tokens=8, compile="always")
            assert found.token_ids == wanted
            assert found.stats.compiled_tokens == found.stats.generated_tokens - 1 > 0
        session.say(QUESTIONS[1], max_new_tokens=4, compile="always")
        said = session.say(QUESTIONS[0], max_new_tokens=4, compile="always").stats
        assert said.compiled_tokens == said.generated_tokens - 1 > 0
        session.forget()
    assert digest(session) == before


def test_auto_counts_the_seconds_of_all_answers(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> None:
    session, facts = read(tiny.tiny_model("llama"), "snapkv"), SimpleNamespace(load_s=0.3)
    monkeypatch.setattr(decoding, "build_times", lambda *_: facts)
    loaded = []
    for _ in range(100):
        loaded.append(session.ask(QUESTIONS[0], max_new_tokens=4).stats.compiled_tokens)
        if loaded[-1]:
            break
    assert loaded[0] == 0
    assert loaded[-1] > 0


def test_questions_of_several_threads_do_not_see_one_another() -> None:
    session = read(tiny.tiny_model("llama"))
    expected, found, inside = answers(session), [], threading.Event()

    def interrupt(_: int) -> None:
        if not inside.is_set():
            inside.set()
            other = threading.Thread(target=lambda: found.append(answers(session)))
            other.start()
            other.join()

    own = session.ask(QUESTIONS[0], max_new_tokens=8, compile="never", on_token=interrupt)
    assert own.token_ids == expected[0]
    assert found == [expected]


@pytest.mark.stores(reason="this one lays heads out anew")
@pytest.mark.parametrize("do", ["ask", "save"])
def test_nobody_sees_a_document_while_it_is_laid_out_for_the_first_question(
    do: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer, packed = tiny.tiny_model("llama"), tiny.tokenizer(), RaggedStore._packed
    session, found = read(model, "adakv"), []
    expected = answers(read(model, "adakv"))
    assert isinstance(session.cache.compressed_layers[0].store, RaggedStore)

    def other() -> None:
        if do == "save":
            session.save(tmp_path / "document.kvc")
        found.append(answers(session))

    threads = [threading.Thread(target=other)]

    def slowly(store: RaggedStore, parts: list[torch.Tensor]) -> torch.Tensor:
        if threads[0].ident is None:
            threads[0].start()
            threads[0].join(timeout=0.2)
        return packed(store, parts)

    monkeypatch.setattr(RaggedStore, "_packed", slowly)
    own = session.ask(QUESTIONS[0], max_new_tokens=8, compile="never")
    threads[0].join()
    assert own.token_ids == expected[0]
    assert found == [expected]
    if do == "save":
        assert answers(compresskv.open_session(tmp_path / "document.kvc", model, tokenizer)) == expected


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_is_for_its_owner_alone_unless_one_was_there(tmp_path: Path) -> None:
    session, place = read(tiny.tiny_model("llama")), tmp_path / "document.kvc"
    for mode in (0o600, 0o640):
        session.save(place)
        assert stat.S_IMODE(place.stat().st_mode) == mode
        place.chmod(0o640)


def test_one_turn_at_a_time() -> None:
    session, refused = read(tiny.tiny_model("llama")), []

    def interrupt(_: int) -> None:
        with pytest.raises(CacheStateError, match="another turn of the conversation is being answered"):
            session.say(QUESTIONS[1], max_new_tokens=1)
        refused.append(True)

    session.say(QUESTIONS[0], max_new_tokens=2, compile="never", on_token=interrupt)
    assert refused
    assert len(session.turns) == 1
    session.say(QUESTIONS[1], max_new_tokens=2, compile="never")
    assert len(session.turns) == 2


@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_conversation_sees_its_turns_and_questions_do_not(family: str, method: str) -> None:
    model, tokenizer = tiny.tiny_model(family), tiny.tokenizer()
    session = read(model, method)
    expected, before = answers(session), digest(session)
    sequence, said = list(session.token_ids), []
    for number, turn in enumerate([*QUESTIONS, *QUESTIONS]):
        found = session.say(turn, max_new_tokens=4, compile="never")
        asked = tokenizer(f"{turn} <end> 4 5" if number == 0 else f"<end> {turn} <end> 4 5")["input_ids"]
        unread = said[-1:] if said[-1:] != [tokenizer.eos_token_id] else []  # the template writes its own
        sequence += [*unread, *asked]
        with compresskv.compressing(model, method, 24, prompt_tokens=len(session.token_ids)) as cache:
            num_rest = len(sequence) - len(session.token_ids)
            whole = tiny.read(model, cache, torch.tensor([sequence]), [len(session.token_ids), num_rest])
        assert found.token_ids[0] == int(whole[0, -1].argmax())
        assert found.stats.prompt_tokens == len(sequence)
        behind = (len(sequence) - len(session.token_ids)) * session.facts.kv_nbytes_full // len(session.token_ids)
        if family == "llama":  # a sliding window does not grow
            assert found.stats.kv_nbytes == session.facts.kv_nbytes + behind
            assert found.stats.kv_nbytes_full == session.facts.kv_nbytes_full + behind
        said = found.token_ids
        sequence += said[:-1]
    assert answers(session) == expected
    assert digest(session) == before
    session.forget()
    assert session.say(QUESTIONS[1], max_new_tokens=8, compile="never").token_ids == expected[1]


@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_long_conversation_forgets_its_oldest_turns(family: str, method: str) -> None:
    session = read(tiny.tiny_model(family), method)
    session.turns_budget = 40
    expected, before = answers(session), digest(session)
    document, held = kept(session), []
    for number in range(6):
        session.say(tiny.random_words(6, seed=number), max_new_tokens=4, compile="never")
        talk = session._conversation
        assert talk is not None
        held.append(talk.num_kept)
        assert 0 < talk.num_kept <= 40
        first = talk.cache.get_seq_length() - talk.num_kept
        for layer, own in zip(talk.cache.compressed_layers, document, strict=True):
            assert layer.store is not None
            stored = layer.store.positions.expand(1, 2, -1)[0].tolist()
            later = [*range(first, talk.cache.get_seq_length())]
            assert [[token for token in head if token >= 0] for head in stored] == [head + later for head in own[0]]
        assert answers(session) == expected
        numbers = [turn.number for turn in session.turns]
        assert numbers == [*range(numbers[0], number + 2)]
        assert [turn.question for turn in session.turns] == [tiny.random_words(6, seed=own - 1) for own in numbers]
        assert sum(turn.num_tokens or 0 for turn in session.turns) == session.num_said
    assert numbers[0] > 1
    assert any(after < earlier for earlier, after in pairwise(held))
    assert digest(session) == before
    session.say(tiny.random_words(60), max_new_tokens=4, compile="never")
    assert talk.num_kept == 40
    assert [(turn.number, turn.num_tokens) for turn in session.turns] == [(7, 40)]


@pytest.mark.stores(reason="a file names the stores that users have")
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_conversation_goes_on_as_before(family: str, method: str, store: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    session = read(model, method, store=store)
    session.turns_budget = 20
    expected = answers(session)
    for number in range(3):
        session.say(tiny.random_words(6, seed=number), max_new_tokens=4, compile="never")
    session.save(tmp_path / "saved.kvc")
    opened = compresskv.open_session(tmp_path / "saved.kvc", model, tiny.tokenizer())
    opened.turns_budget = 20
    assert session.turns == opened.turns != ()
    for number in range(3):
        turn = tiny.random_words(6, seed=10 + number)
        found, wanted = (one.say(turn, max_new_tokens=4, compile="never") for one in (opened, session))
        assert found.token_ids == wanted.token_ids
        assert found.stats.retained_per_layer == wanted.stats.retained_per_layer
        talks = [one._conversation for one in (opened, session)]
        assert len({talk.cache.nbytes for talk in talks if talk is not None}) == 1
    assert answers(opened) == expected


def test_a_turn_that_was_interrupted_ends_the_conversation() -> None:
    session = read(tiny.tiny_model("llama"))
    expected = answers(session)
    session.say(QUESTIONS[1], max_new_tokens=4, compile="never")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.say(QUESTIONS[1], max_new_tokens=4, compile="never", on_token=interrupt)
    assert session.say(QUESTIONS[0], max_new_tokens=8, compile="never").token_ids == expected[0]
    with pytest.raises(PromptError, match="the question is empty"):
        session.say(" ")
    with pytest.raises(PromptError, match="with what was said before, but the model's context leaves room for 384"):
        session.say(tiny.random_words(280))
    assert session._conversation is not None


@pytest.mark.parametrize("chunk", [1000, 37, 16])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reading_in_chunks_keeps_what_reading_at_once_does(family: str, method: str, chunk: int) -> None:
    model = tiny.tiny_model(family)
    whole, steps = read(model, method), []
    session = read(model, method, chunk=chunk, on_read=lambda done, total: steps.append((done, total)))
    torch.testing.assert_close(logits(session), logits(whole), atol=1e-4, rtol=0)
    assert steps == sorted(steps)
    assert all(done < total for done, total in steps[:-1])
    assert steps[-1][0] == steps[-1][1] == steps[0][1]


@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "kvzip", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_later_part_is_read_in_chunks_as_at_once(family: str, method: str, store: str) -> None:
    more = tiny.random_words(120, seed=4)
    sessions = [read(tiny.tiny_model(family), method, 0.4, store=store) for _ in range(2)]
    for session, chunk in zip(sessions, (None, TAIL + 1), strict=True):
        session.append(more, chunk=chunk)
    assert kept(sessions[0]) == kept(sessions[1])
    # Between two codes, rounding decides.
    torch.testing.assert_close(*map(logits, sessions), atol=1e-4 if store == "native" else 1e-2, rtol=0)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_document_grows_by_parts_that_see_what_was_kept(family: str, method: str, budget: Any) -> None:
    model, more = tiny.tiny_model(family), tiny.random_words(50, seed=4)
    session = read(model, method, budget)
    first = evictions(session.cache)
    session.append(more)
    assert session.token_ids == tiny.tokenizer()(f"<begin> {tiny.random_words(NUM_WORDS)} {more}")["input_ids"]
    sequence = torch.cat([torch.tensor([session.token_ids]), tiny.random_tokens(5, seed=8)], dim=1)
    wanted = oracle_logits(family, sequence, first, None, evictions(session.cache))[:, -5:]
    torch.testing.assert_close(logits(session), wanted, atol=1e-4, rtol=0)
    if method != "full":
        mean = sum(map(len, kept_by_head(session))) / len(kept_by_head(session))
        num_layers = len(compressible_layers(model))
        asked = 0.4 * 141 if budget == 0.4 else 24 if budget == 24 else sum(budget[:num_layers]) / num_layers
        assert asked - 3 <= mean <= asked + (0.6 if budget == 0.4 else 0)
        assert session.facts.mean_retained == pytest.approx(mean)
    if family == "llama":  # sliding windows have other sizes
        whole = f"{tiny.random_words(NUM_WORDS)} {more}"
        assert session.facts.kv_nbytes_full == compresskv.read(model, tiny.tokenizer(), whole).facts.kv_nbytes_full


@pytest.mark.parametrize("method", ["snapkv", "adakv", "knorm", "kvzip"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_growing_document_stays_within_the_count_of_each_layer(family: str, method: str) -> None:
    counts = [20, 2 * NUM_WORDS, 30, 24, 28, 40]  # one of them above all that was read at first
    session = read(tiny.tiny_model(family), method, counts)
    for number in range(2):
        session.append(tiny.random_words(50, seed=number))
        for count, layer in zip(counts, session.cache.compressed_layers, strict=False):
            assert count - 3 <= layer.mean_retained <= count or layer.mean_retained == len(session.token_ids)


@pytest.mark.stores(reason="a file names the stores that users have")
@pytest.mark.parametrize("store", ["native", "int4", "int2"])
@pytest.mark.parametrize("budget", [24, 0.4, "9 kB"], ids=str)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "vote", "kvzip", "knorm"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_opened_document_grows_as_before(family: str, method: str, budget: Any, store: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    session = read(model, method, budget, store=store)
    session.save(tmp_path / "saved.kvc")
    opened = compresskv.open_session(tmp_path / "saved.kvc", model, tiny.tokenizer())
    for number in range(2):
        session.append(tiny.random_words(30, seed=number))
        opened.append(tiny.random_words(30, seed=number), **tiny.options_for(model, method))
    assert kept(opened) == kept(session)
    assert torch.equal(logits(opened), logits(session))
    assert opened.token_ids == session.token_ids


@pytest.mark.parametrize("store", ["native", "int8"])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "vote", "kvzip"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reading_within_little_memory_cuts_part_by_part(
    family: str, method: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, peak, caches = tiny.tiny_model(family), [0], []
    full = read(model, "full", 1.0).cache.compressed_layers
    most = sum(layer.nbytes for layer in full) * (16 if method == "kvzip" else 7) // 6
    begin_part = CompressedCache.begin_part

    def noted(cache: CompressedCache, *args: Any, **options: Any) -> None:
        caches.append(cache)
        begin_part(cache, *args, **options)

    def watch(_: int, __: int) -> None:
        if caches:
            peak[0] = max(peak[0], sum(layer.nbytes for layer in caches[-1].compressed_layers))

    monkeypatch.setattr(CompressedCache, "begin_part", noted)
    options = tiny.options_for(model, method)
    document = tiny.random_words(2 * NUM_WORDS)
    options |= {"method": method, "budget": 0.2, "store": store, "max_memory": most, "on_read": watch}
    session = compresskv.read(model, tiny.tokenizer(), document, **options)
    assert 0 < peak[0] <= most
    assert len(caches) > 1
    assert session.facts.mean_retained == pytest.approx(0.2 * 181, abs=1)


@pytest.mark.parametrize("ask", ["ask", "say"])
def test_a_document_does_not_grow_between_a_questions_tokens_and_its_answer(
    ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, refused = read(tiny.tiny_model("llama")), []
    expected = answers(session)[0]

    def grow() -> None:
        try:
            session.append(tiny.random_words(40))
        except CacheStateError as error:
            refused.append(str(error))

    def interrupted(*args: Any) -> list[int]:
        found = question_tokens(*args)
        other = threading.Thread(target=grow)
        other.start()
        other.join()
        return found

    monkeypatch.setattr("compresskv.sessions.session.question_tokens", interrupted)
    found = getattr(session, ask)(QUESTIONS[0], max_new_tokens=8, compile="never")
    assert len(refused) == 1
    assert found.token_ids == expected


@pytest.mark.parametrize("ask", ["ask", "say"])
def test_a_question_that_came_while_a_document_grew_is_of_what_it_was(
    ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, found, asked, grown = read(tiny.tiny_model("llama")), [], threading.Event(), threading.Event()
    expected, before = answers(session)[0], session.facts

    def interrupted(*args: Any) -> list[int]:
        tokens = question_tokens(*args)
        asked.set()
        grown.wait(20)
        return tokens

    def put() -> None:
        found.append(getattr(session, ask)(QUESTIONS[0], max_new_tokens=8, compile="never"))

    monkeypatch.setattr("compresskv.sessions.session.question_tokens", interrupted)
    other = threading.Thread(target=put)

    def start_once(_: int, __: int) -> None:
        if not asked.is_set():
            other.start()
            asked.wait(20)

    session.append(tiny.random_words(40), on_read=start_once)
    grown.set()
    other.join()
    assert found[0].token_ids == expected
    assert session.num_said == 0, "a conversation is of the document as it is"
    token_nbytes = before.kv_nbytes_full // before.num_tokens
    stats = found[0].stats
    assert stats.kv_nbytes_full == stats.prompt_tokens * token_nbytes < session.facts.kv_nbytes_full


def test_a_document_whose_growth_was_interrupted_is_as_before() -> None:
    session = read(tiny.tiny_model("llama"))
    expected, before = answers(session), session.facts

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.append(tiny.random_words(40), on_read=interrupt)
    assert answers(session) == expected
    assert session.facts == before
    session.append(tiny.random_words(40))
    assert session.facts.num_tokens == before.num_tokens + 40


def test_the_default_is_the_best_method_that_the_model_has_a_profile_for() -> None:
    model, document = tiny.tiny_model("llama"), tiny.random_words(NUM_WORDS)
    assert compresskv.read(model, tiny.tokenizer(), document).facts.method == "kvzip"
    session = compresskv.read(model, tiny.tokenizer(), document, **tiny.options_for(model, "forecast"))
    assert session.facts.method == "forecast"
    with pytest.raises(ProfileError, match=r"none\.json"):
        compresskv.read(model, tiny.tokenizer(), document, profile="none.json")


def on_device(store: str) -> str:
    """The default store where this is the CPUs' own."""
    return store if tiny.DEVICE.type == "cpu" else "native"


@pytest.mark.stores(reason="what they take is compared")
@pytest.mark.parametrize(
    ("losses", "store"),
    [
        ({}, "int8"),
        ({"int8": 0.001, "int4k8": 0.002, "int4": 0.004}, "int4"),
        ({"int8": 0.001, "int4k8": 0.002, "int4": 0.04}, "int4k8"),
        ({"int8": 0.001, "int4k8": 0.02, "int4": 0.04}, "int8"),
        ({"int8": 0.02, "int4k8": 0.02, "int4": 0.04}, "native"),
        ({"int8": 0.001, "of another release": 0.0}, "int8"),
    ],
)
def test_the_default_store_is_the_smallest_that_the_model_bears(losses: dict[str, float], store: str) -> None:
    model, document = tiny.tiny_model("llama"), tiny.random_words(240)
    profile = replace(tiny.random_profile(model), store_losses=losses)
    facts = compresskv.read(model, tiny.tokenizer(), document, profile=profile).facts
    assert facts.store == on_device(store)
    assert facts.kv_nbytes <= 0.25 * facts.kv_nbytes_full < 1.2 * facts.kv_nbytes
    assert (facts.mean_retained > 0.3 * facts.num_tokens) is (facts.store != "native")
    assert compresskv.read(model, tiny.tokenizer(), document, profile=profile, store="native").facts.store == "native"


@pytest.mark.stores(reason="what they take is compared")
@pytest.mark.parametrize(
    ("budget", "store"),
    [
        ("100% of bytes", "native"),
        ("60% of bytes", "int8"),
        ("25% of bytes", "int4"),
        ("12% of bytes", "int2"),
        ("12 kB", "int2"),
        (0.25, "int4"),  # in tokens: as many in every store
    ],
)
def test_the_fewer_bytes_are_given_the_fewer_bits_hold_a_document_by_default(budget: float | str, store: str) -> None:
    model, document = tiny.tiny_model("llama"), tiny.random_words(240)
    losses, shares = {"int8": 0.001, "int4": 0.005, "int2": 0.05}, {"0.0625": 0.8, "0.25": 0.4, "0.5": 0.2}
    profile = replace(tiny.random_profile(model), store_losses=losses, document_losses=shares)
    facts = compresskv.read(model, tiny.tokenizer(), document, profile=profile, budget=budget).facts
    assert facts.store == on_device(store)


@pytest.mark.parametrize("method", [None, "kvzip", "snapkv"])
def test_the_default_store_is_the_models_whatever_the_method_needs(
    method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
    model, document = tiny.tiny_model("llama"), tiny.random_words(NUM_WORDS)
    losses = {"int8": 0.02, "int4k8": 0.02, "int4": 0.004}
    profile = replace(tiny.random_profile(model), query_centres=None, store_losses=losses)
    write_profile(profile, default_path(profile.fingerprint))
    assert compresskv.read(model, tiny.tokenizer(), document, method=method).facts.store == on_device("int4")


@pytest.mark.parametrize("words", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", tiny.STORES)
def test_the_shortest_documents_are_read_by_default(words: int, dtype: torch.dtype, store: str) -> None:
    model = tiny.tiny_model("llama", dtype=dtype)
    session = compresskv.read(model, tiny.tokenizer(), tiny.random_words(words), store=store)
    assert 1 <= session.facts.mean_retained <= session.facts.num_tokens


def test_a_lossy_store_is_warned_of_where_it_was_asked_for() -> None:
    model = tiny.tiny_model("llama")
    profile = replace(tiny.random_profile(model), store_losses={"int8": 0.001, "int4": 0.2})
    with pytest.warns(UserWarning, match="bears the store 'int4' badly") as told:
        compresskv.read(model, tiny.tokenizer(), tiny.random_words(NUM_WORDS), profile=profile, store="int4")
    assert [warning.filename for warning in told] == [__file__]


def test_what_cannot_be_read_or_asked_is_refused() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tokenizer()
    with pytest.raises(PromptError, match="the document is empty"):
        compresskv.read(model, tokenizer, "  ")
    with pytest.raises(PromptError, match="512, 256 are needed for a question and its answer"):
        compresskv.read(model, tokenizer, tiny.random_words(300))
    with pytest.raises(ConfigError, match="lookahead=2: a document is cut before anything is asked"):
        read(model, "snapkv", lookahead=2)
    with pytest.raises(ConfigError, match="chunk=0 must be an int of at least 1"):
        read(model, chunk=0)
    session = read(model)
    with pytest.raises(PromptError, match="the question is empty"):
        session.ask(" ")
    with pytest.raises(PromptError, match="the document is empty"):
        session.append(" ")
    with pytest.raises(PromptError, match="the document has 291 tokens, but of the model's context of 512"):
        session.append(tiny.random_words(200))
    with pytest.raises(ConfigError, match=r"max_memory=9000 is too little: .* need \d\d,\d\d\d bytes"):
        read(model, max_memory=9000)
    with pytest.raises(ConfigError, match="max_memory=30000 is too little"):  # it evicts nothing, whatever the budget
        read(model, "full", max_memory=30000)
    session.say(QUESTIONS[0], max_new_tokens=1)
    with pytest.raises(CacheStateError, match=r"the document cannot grow while a conversation .* forget\(\) it first"):
        session.append("5")
    with pytest.raises(PromptError, match="the model's context leaves room for 384 before the answer"):
        session.ask(tiny.random_words(300))


def test_a_session_of_another_model_dtype_or_tokenizer_is_refused(tmp_path: Path) -> None:
    model, path = tiny.tiny_model("llama"), tmp_path / "saved.kvc"
    read(model).save(path)
    with pytest.raises(SessionError, match=r"belongs to another model: it is for llama-.*, this is qwen2-"):
        compresskv.open_session(path, tiny.tiny_model("qwen2"), tiny.tokenizer())
    halved = tiny.build_model("llama").to(torch.bfloat16)
    with pytest.raises(SessionError, match="in float32, this model is in bfloat16: load it with dtype=float32"):
        compresskv.open_session(path, halved, tiny.tokenizer())
    with pytest.raises(SessionError, match="was read with another tokenizer"):
        compresskv.open_session(path, model, tiny.build_tokenizer(first=5))


def test_an_answer_says_whether_it_was_cut_off() -> None:
    model = tiny.build_model("llama")
    session = read(model, "snapkv")
    found = session.ask(QUESTIONS[0], max_new_tokens=4, compile="never")
    assert (found.stats.generated_tokens, found.stats.cut_off) == (4, True)
    model.generation_config.eos_token_id = end = found.token_ids[2]  # type: ignore[union-attr]
    ended = session.ask(QUESTIONS[0], max_new_tokens=4, compile="never")
    assert ended.token_ids == found.token_ids[: found.token_ids.index(end) + 1]
    assert not ended.stats.cut_off
