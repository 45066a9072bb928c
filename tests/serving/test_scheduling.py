"""Blocks: given back when a prompt was cut, whatever happens to its request, and never one too many."""

import copy
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import Engine
from reference import ships_log
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.serving.load import Load, run_load
from compresskv.peers import engines as bench
from compresskv.serving import scheduler
from compresskv.serving.counters import counters
from compresskv.serving.pages import find_layout

LOG = ships_log()
PROMPTS = [LOG[start : start + 1000] for start in range(0, 3600, 300)]


def held_blocks(engine: Engine, number: int) -> int:
    """Blocks of the request that was added with this id."""
    manager = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    return sum(len(blocks) for name, blocks in manager.req_to_blocks.items() if name.split("-")[0] == str(number))


def test_blocks_are_freed_in_the_step_that_ends_the_prompt(roomy: Engine) -> None:
    before = {name: counters().total(name) for name in ("evicted_prompts", "evicted_tokens", "freed_blocks")}
    roomy.add(LOG[:1500], 100, "0")
    held = []
    while roomy.llm.llm_engine.has_unfinished_requests():
        roomy.step()
        held.append(held_blocks(roomy, 0))
        if held[-1]:
            assert len(roomy.worker_blocks(0)) == held[-1]  # the worker's list is the scheduler's
    roomy.check_clean()
    # 700 + 700 + 100 tokens in blocks of 128, of which 200 are kept; 56 more fill the second block, then a third
    assert held[:3] == [6, 11, 2]
    assert held[58:60] == [2, 3]
    assert held[-1] == 0
    grown = {name: counters().total(name) - value for name, value in before.items()}
    assert grown == {"evicted_prompts": 1, "evicted_tokens": 1300, "freed_blocks": 10}


def test_the_log_tells_now_and_then(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the workers' seconds, which the scheduler does not know by itself."""
    lines: list[str] = []
    monkeypatch.setattr(scheduler, "logger", SimpleNamespace(info=lambda text, line: lines.append(text % line)))
    monkeypatch.setattr(roomy.scheduler, "_logged_at", -math.inf)
    monkeypatch.setattr(roomy.scheduler, "_has_news", False)
    roomy.answers(PROMPTS[:3], max_tokens=1)
    totals = counters().totals()
    pattern = r"(\d+) prompts cut, .* blocks freed, ([\d.]+) s of scoring, [\d.]+ s of compaction"
    told = [(int(found[1]), float(found[2])) for line in lines if (found := re.search(pattern, line))]
    # the second was cut in a later step, the third in one that is told of for the pause behind it
    assert [prompts for prompts, _ in told] == [totals["evicted_prompts"] - 2, totals["evicted_prompts"]]
    assert told[0][1] <= told[1][1]
    assert totals["scoring_seconds"] > 0
    assert told[1][1] == pytest.approx(totals["scoring_seconds"], abs=0.006)
    roomy.add(PROMPTS[0], 50, "0")
    for _ in range(4):
        roomy.step()
    assert len(lines) == 2  # cut, but it is busy
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "shutdown", lambda _self: None)  # the engine is used again
        roomy.scheduler.shutdown()
    assert f"{totals['evicted_prompts'] + 1:.0f} prompts cut" in lines[2]
    roomy.llm.llm_engine.abort_request(["0"])
    roomy.step()
    assert len(lines) == 3
    roomy.check_clean()


def test_a_bench_runs_in_a_smaller_pool(roomy: Engine) -> None:
    """Of three whole requests, plain or cut."""
    engine = bench.Engine(roomy.llm)
    load = Load(length=600, pool=3, num_requests=6, new_tokens=12)
    rows = []
    for budget in (1.0, 60):
        steps: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "step", lambda steps=steps: steps.append(roomy.step()) or steps[-1])
            rows.append(run_load(engine, load, LOG, budget))
        answers = [output.outputs[0].token_ids for outputs in steps for output in outputs if output.finished]
        assert [len(answer) for answer in answers] == [12] * 6  # what the figures count with
        assert rows[-1]["num_steps"] == len(steps)
        assert 0 < rows[-1]["first_token_s"] < rows[-1]["last_first_token_s"] < rows[-1]["wall_s"]
        assert rows[-1]["num_preemptions"] == 0
    whole, cut = rows
    assert (whole["max_running"], cut["max_running"]) == (3, 6)
    assert whole["mean_running"] < cut["mean_running"]
    assert whole["num_steps"] > cut["num_steps"]
    roomy.check_clean()


def test_the_last_chunk_holds_the_whole_window(roomy: Engine) -> None:
    """1,410 tokens in steps of 700: the second stops early, so that the window of 32 is not split."""
    roomy.add(LOG[:1410], 3, "0")
    steps = []
    while roomy.llm.llm_engine.has_unfinished_requests():
        before = [request.num_computed_tokens for request in roomy.scheduler.running] or [0]
        roomy.step()
        steps += [request.num_computed_tokens - before[0] for request in roomy.scheduler.running]
    assert steps[:3] == [700, 678, 32]
    roomy.check_clean()


def test_more_requests_run_at_once(cramped: Engine) -> None:
    """24 blocks: three whole prompts of 1,000 tokens, or many that are cut to a block each."""
    cramped.answers(PROMPTS[:4], max_tokens=20, budget="off")
    assert cramped.max_running == 3
    cramped.answers(PROMPTS, max_tokens=60)
    assert cramped.max_running >= 10


def test_preempted_requests_answer_the_same(cramped: Engine, roomy: Engine) -> None:
    """They are read again, cut again, and fed what they have said already. Freed blocks serve others meanwhile."""
    prompts = PROMPTS[:10]
    expected = roomy.answers(prompts, max_tokens=180, budget=120)
    preempted = set()
    original = type(cramped.scheduler)._preempt_request

    def noting(scheduler: object, request: object, *args: object, **kwargs: object) -> None:
        preempted.add(request.request_id)  # type: ignore[attr-defined]
        original(scheduler, request, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cramped.scheduler), "_preempt_request", noting)
        answers = cramped.answers(prompts, max_tokens=180)
    assert preempted
    assert len(cramped.positions) == len(prompts) + len(preempted)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.tokens == wanted.tokens
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=5e-4)


def test_nothing_is_read_of_what_was_evicted(roomy: Engine) -> None:
    """Poison in every block that no request holds, and behind the kept tokens in those it holds."""
    expected = roomy.answers([LOG[:1500]], max_tokens=40)[0].tokens
    assert roomy.answers([LOG[:1500]], max_tokens=40, budget="off")[0].tokens != expected  # what it holds matters
    roomy.add(LOG[:1500], 40, "0")
    while held_blocks(roomy, 0) != 2:
        roomy.step()
    held = roomy.worker_blocks(0)
    parts = [part for pages in roomy.runner.compaction._pages.values() for part in (pages._keys, pages._values)]
    free = [block for block in range(1, len(parts[0]._view)) if block not in held]
    for part in parts:
        part._view[free] = 1e4
        part._view[held[1], 200 - 128 :] = 1e4
    answer: list[int] = []
    while roomy.llm.llm_engine.has_unfinished_requests():
        for output in roomy.step():
            answer = list(output.outputs[0].token_ids)
    for part in parts:
        part._view.zero_()
    assert answer == expected
    roomy.check_clean()


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_aborted_requests_leave_nothing(roomy: Engine, after: int) -> None:
    """Before, at and behind the end of the prompt."""
    roomy.add(LOG[:1500], 50, "0")
    roomy.add(LOG[:300], 4, "1")
    for _ in range(after):
        roomy.step()
    roomy.llm.llm_engine.abort_request(["0"])
    while roomy.llm.llm_engine.has_unfinished_requests():
        roomy.step()
    roomy.check_clean()


def test_a_single_token(roomy: Engine, plain: Engine) -> None:
    """The request ends in the step that cuts its prompt. Its token is plain vLLM's: it comes from the whole cache."""
    before = counters().total("evicted_prompts")
    (alone,) = roomy.answers([LOG[:1500]], max_tokens=1)
    assert counters().total("evicted_prompts") == before + 1
    (expected,) = plain.answers([LOG[:1500]], max_tokens=1)
    assert alone.tokens == expected.tokens
    assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_prompts_join_while_others_decode(roomy: Engine) -> None:
    expected = [roomy.answers([prompt], max_tokens=40)[0].tokens for prompt in PROMPTS[:3]]
    finished = {}
    for number, prompt in enumerate(PROMPTS[:3]):
        roomy.add(prompt, 40, str(number))
        for _ in range(7):
            finished |= {one.request_id: list(one.outputs[0].token_ids) for one in roomy.step() if one.finished}
    while roomy.llm.llm_engine.has_unfinished_requests():
        finished |= {one.request_id: list(one.outputs[0].token_ids) for one in roomy.step() if one.finished}
    assert [finished[str(number)] for number in range(3)] == expected
    roomy.check_clean()


def test_streaming_sessions_keep_their_prompt(roomy: Engine) -> None:
    """Their prompt grows later, which no cut foresees."""
    core = roomy.llm.llm_engine.engine_core
    add_request = core.add_request

    def resumable(request: object) -> None:
        request.resumable = True  # type: ignore[attr-defined]
        add_request(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "add_request", resumable)
        roomy.add(LOG[:900], 5, "0")
    for _ in range(4):
        roomy.step()
    assert held_blocks(roomy, 0) == 8
    roomy.llm.llm_engine.abort_request(["0"])
    roomy.step()
    roomy.check_clean()


def test_the_layout_covers_a_block(cramped: Engine) -> None:
    """Every element once: its number was written in parts that bfloat16 holds exactly."""
    layer = cramped.runner.compaction._layers[0]
    layout = find_layout(layer, cramped.scheduler.block_size)
    places = torch.cat([layout.keys.flatten(), layout.values.flatten()])
    num_elements = 2 * cramped.scheduler.block_size * layer.num_kv_heads * layer.head_size
    assert torch.equal(places.sort().values.cpu(), torch.arange(num_elements))


def test_keys_are_read_alike_with_and_without_strides(cramped: Engine) -> None:
    """On processors with AMX, keys of neighbouring tokens are interleaved, and no strides tell where they are."""
    by_strides = cramped.runner.compaction._pages[2]
    cache = by_strides._keys._cache
    assert by_strides._keys._view is not None
    one_by_one = copy.copy(by_strides)
    one_by_one._keys = copy.copy(by_strides._keys)
    one_by_one._keys._view = None
    blocks = torch.tensor([7, 2, 11], device=cache.device)
    cache[blocks] = torch.randn(3, *cache.shape[1:], device=cache.device)
    keys = by_strides.keys(blocks, 0, 300)
    assert keys.shape == (1, 2, 300, 32)
    assert torch.equal(one_by_one.keys(blocks, 0, 300), keys)
    moved = torch.tensor([0, 1, 130, 131, 299], device=cache.device)
    one_by_one.move(blocks, moved, blocks, 2)
    assert torch.equal(by_strides.keys(blocks, 0, 5), keys[:, :, moved])
