"""What goes wrong with one prompt stays with it: it is kept whole, or cut by position, and the engine goes on."""

import copy
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import Engine
from random_model import NUM_LAYERS, VOCAB_SIZE

from compresskv.serving.counters import counters
from compresskv.serving.evicted import EvictedTokens
from compresskv.serving.room import scratch_nbytes
from compresskv.serving.scheduler import CompressedScheduler, eviction_line
from compresskv.serving.settings import EvictionSpec, PlannedEviction

PROMPTS = [random.Random(0).choices(range(VOCAB_SIZE), k=length) for length in (250, 130, 301)]
BY_POSITION = [[0, 1, 2, 3, *range(length - 36, length)] for length in (250, 130, 301)]


@pytest.fixture
def grown() -> Callable[[], dict[str, float]]:
    """By how much counters have grown since the test began."""
    before = counters().totals()
    return lambda: {name: value - before[name] for name, value in counters().totals().items() if value != before[name]}


@pytest.fixture(params=["small", "small_caching", "small_async"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Without prefix caching, with it, and where steps are scheduled ahead."""
    found: Engine = request.getfixturevalue(request.param)
    return found


def raising(*_args: object, **_kwargs: object) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize(
    ("place", "name"),
    [("compresskv.serving.compaction", "observe"), ("compresskv.serving.compaction", "choose_tokens")],
)
def test_a_prompt_that_cannot_be_scored_is_cut_by_position(
    place: str, name: str, engine: Engine, grown: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are others' already."""
    monkeypatch.setattr(f"{place}.{name}", raising)
    answers = engine.answers(PROMPTS, max_tokens=20)
    assert [len(answer.tokens) for answer in answers] == [20, 20, 20]
    assert sorted(engine.positions) == sorted(BY_POSITION)
    assert grown()["unscored_prompts"] == 3


def test_queries_that_are_not_seen_end_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a step is replayed as one CUDA graph."""
    for layer in list(engine.runner.compaction._layers.values())[1:]:
        monkeypatch.setattr(layer.impl, "forward", layer.impl.forward.__wrapped__)
    engine.answers(PROMPTS, max_tokens=5)
    assert sorted(engine.positions) == sorted(BY_POSITION)


@pytest.mark.parametrize("missing", ["blocks", "window"])
def test_what_cannot_be_cut_is_kept_whole(
    missing: str,
    small: Engine,
    small_caching: Engine,
    grown: Callable[[], dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decided before any block is given back."""
    engine = small_caching if missing == "blocks" else small
    expected = engine.answers([PROMPTS[0]], max_tokens=20, budget="off")[0].tokens
    if missing == "blocks":
        monkeypatch.setattr(engine.scheduler._manager, "prepare", lambda *_arguments: None)
    else:
        monkeypatch.setattr(CompressedScheduler, "_update_after_schedule", a_wider_window)
    (answer,) = engine.answers([PROMPTS[0]], max_tokens=20)
    assert answer.tokens == expected
    assert not engine.positions
    assert grown()["whole_prompts"] == 1


def a_wider_window(scheduler: Any, output: Any, update: Any = CompressedScheduler._update_after_schedule) -> None:
    """As if the last chunk were too short."""
    for name, spec in scheduler._ending.items():
        scheduler._ending[name] = replace(spec, window_size=400)
    update(scheduler, output)


def test_prompts_without_room_for_a_copy_are_counted_and_told(
    small_caching: Engine, grown: Callable[[], dict[str, float]]
) -> None:
    small_caching.scheduler._reasons.clear()
    small_caching.answers([[*PROMPTS[2], *PROMPTS[0], *PROMPTS[1]]], max_tokens=1)
    small_caching.answers([PROMPTS[0]], max_tokens=1, budget="off")  # which wants nothing else
    assert grown() == {"whole_prompts": 1}
    line = eviction_line(counters().totals(), small_caching.scheduler._reasons)
    assert re.search(r"; 1 not cut as asked \(no room for a copy in the pool: 1\)", line)


def test_a_bad_budget_that_passed_the_server_keeps_its_prompt(
    small: Engine, grown: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compresskv.serving.plugin.check_budget_of", lambda _parameters: None)
    assert small.answers([PROMPTS[0]], max_tokens=3, budget="lots")
    assert not small.positions
    assert grown() == {"whole_prompts": 1}


def test_a_cut_of_a_request_that_is_not_there_is_ignored(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = small.runner.execute_model

    def with_another(output: Any, *rest: Any) -> Any:
        output = copy.copy(output)
        planned = {"nobody": PlannedEviction(EvictionSpec(100, 100, 40, 18), [1, 2], 18)}
        output.compresskv_evictions = output.compresskv_evictions | planned
        return execute(output, *rest)

    monkeypatch.setattr(small.runner, "execute_model", with_another)
    assert [len(answer.tokens) for answer in small.answers(PROMPTS, max_tokens=9)] == [9, 9, 9]
    assert len(small.positions) == 3


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_no_prompt_ends_with_a_single_token(budget: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """101 tokens in chunks of 100."""
    # a prompt of this test's own: of another's, parts may lie in the engine's prefix cache
    prompt, chunks = random.Random(f"single {budget}").choices(range(VOCAB_SIZE), k=101), []
    engine.positions.clear()
    schedule = engine.scheduler.schedule

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        chunks.extend(num for name, num in output.num_scheduled_tokens.items() if name.startswith("single"))
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", noted)
    engine.add(prompt, 3, "single", budget)
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
    assert chunks[:3] == [99, 2, 1]
    assert len(engine.positions[0]) == budget
    engine.check_clean()


def test_few_prompts_end_in_one_step_where_they_are_long(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted of them until all layers have been read is bounded. One always ends."""
    prompts = [prompt[:30] for prompt in PROMPTS]
    expected = small.answers(prompts, max_tokens=10, budget=9)
    monkeypatch.setattr(small.scheduler, "_max_observed", 60)
    planned: list[int] = []
    execute = small.runner.execute_model

    def noting(output: Any, *rest: Any) -> Any:
        planned.append(len(output.compresskv_evictions))
        return execute(output, *rest)

    monkeypatch.setattr(small.runner, "execute_model", noting)
    answers = small.answers(prompts, max_tokens=10, budget=9)
    assert planned[:3] == [2, 1, 0]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    monkeypatch.setattr(small.scheduler, "_max_observed", 1)
    planned.clear()
    small.answers(prompts, max_tokens=10, budget=9)
    assert planned[:4] == [1, 1, 1, 0]


def test_a_cache_that_is_made_anew_is_the_one_that_is_cut(small: Engine) -> None:
    expected = small.answers(PROMPTS, max_tokens=20)
    positions = list(small.positions)
    runner = small.runner
    old = runner.compaction
    runner.kv_caches.clear()
    runner.attn_groups.clear()
    runner.initialize_kv_cache(runner.kv_cache_config)
    assert runner.compaction is not old
    small.note_positions()
    answers = small.answers(PROMPTS, max_tokens=20)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert small.positions == positions
    for layer in runner.compaction._layers.values():
        assert not hasattr(layer.impl.forward.__wrapped__, "__wrapped__")  # tapped once


def test_vllm_sees_the_scratch_when_it_profiles(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may set other memory aside for the cache than what eviction takes."""
    sizes: list[int] = []
    make = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        made = make(*size, **options)
        sizes.append(made.numel() * made.element_size())
        return made

    seen: list[list[int]] = []
    monkeypatch.setattr(torch, "empty", empty)
    vllms = small.vllms_runner_class
    monkeypatch.setattr(vllms, "profile_run", lambda _runner, **_options: seen.append(list(sizes)))
    small.runner.profile_run()
    assert seen == [[scratch_nbytes(small.runner.model_config)]]


@pytest.mark.parametrize(("asked", "left"), [(None, 2**20), (2**26, 2**26)], ids=["what is left", "as asked"])
def test_on_cpus_the_scratch_is_taken_from_what_is_left(
    asked: int | None, left: int, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM looks at the process's size there, and scratch that was let go does not show in it."""
    worker: Any = small.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    available = scratch_nbytes(worker.model_config) + left if asked is None else asked
    monkeypatch.setattr(type(worker).__mro__[1], "determine_available_memory", lambda _worker: available)
    monkeypatch.setattr(worker.cache_config, "kv_cache_memory_bytes", asked)
    assert worker.determine_available_memory() == left


def test_a_step_costs_no_more_calls_with_more_requests(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of our own: nothing loops over requests in Python while the batch stays as it is."""
    numbers = {}
    for num_requests in (3, 12):
        step = decoding_step(small, num_requests, monkeypatch)
        step()
        calls: Counter[str] = Counter()
        sys.setprofile(lambda _frame, event, _argument, calls=calls: calls.update([event]))
        step()
        sys.setprofile(None)
        numbers[num_requests] = calls["call"]
    assert numbers[3] == numbers[12]
    assert len(small.runner.compaction._layers) == NUM_LAYERS


def test_attention_alone_counts_without_what_is_lost(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lengths lie in one place, where CUDA graphs look for them; the batch's own tell whether a prompt is read."""
    if not small.is_v2:
        pytest.skip("vLLM's first runner shows these tensors to nobody else")
    places = set()
    for num_requests in (3, 12):
        positions, lengths = decoding_step(small, num_requests, monkeypatch)()
        assert positions.tolist() == [12] * num_requests
        assert lengths.tolist() == [13] * num_requests
        places.add(lengths.data_ptr())
    assert len(places) == 1


def test_a_dummy_step_between_steps_changes_nothing(small: Engine) -> None:
    """vLLM runs them to warm up, and where other ranks have work: they know no request."""
    if not small.is_v2:
        pytest.skip("vLLM's first runner builds them in another way")
    expected = small.answers([PROMPTS[0]], max_tokens=20)[0].tokens
    small.add(PROMPTS[0], 20, "0")
    answer: list[int] = []
    while small.llm.llm_engine.has_unfinished_requests():
        for output in small.step():
            answer = list(output.outputs[0].token_ids)
        small.runner._dummy_run(4)
    assert answer == expected
    small.check_clean()


def decoding_step(engine: Engine, num_requests: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """What we do in a step in which requests decode that were cut, without what vLLM does in it."""
    runner, vllms = engine.runner, engine.vllms_runner_class
    names, ones = [str(number) for number in range(num_requests)], np.ones(num_requests, dtype=np.int32)
    evicted = EvictedTokens(runner.device)
    for name in names:
        evicted.note(name, 7)
    monkeypatch.setattr(runner, "evicted", evicted)
    if not engine.is_v2:
        monkeypatch.setattr(vllms, "_prepare_inputs", lambda *_arguments: ())
        monkeypatch.setattr(type(runner.input_batch), "req_ids", property(lambda _batch: names))
        return lambda: runner._prepare_inputs(None, ones)
    monkeypatch.setattr(vllms, "prepare_attn", lambda _runner, batch: batch.positions)
    monkeypatch.setattr(runner, "_prepare_metadata", lambda held: held.seq_lens)
    lengths = torch.full((num_requests,), 20, dtype=torch.int32)
    batch = SimpleNamespace(
        req_ids=names,
        num_reqs=num_requests,
        positions=torch.full((num_requests,), 19),
        num_scheduled_tokens=ones,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
    )

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        prepared = runner.prepare_attn(batch), runner.model_state.prepare_attn(batch)
        assert batch.positions.tolist() == [19] * num_requests
        assert lengths.tolist() == [20] * num_requests
        return prepared

    return step
