"""Prompts larger than the pool, cut while they are read: tokens and positions are those of `compressing`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, start
from random_model import CHUNKS, LONGEST_IN_CHUNKS, VOCAB_SIZE, chunked_engine_options
from transformers import AutoModelForCausalLM

import compresskv
from compresskv.models.decoding import decode_one_token, prefill
from compresskv.selection.cuts import END_TOKENS

PROMPTS = [random.Random(1).choices(range(VOCAB_SIZE), k=length) for length in (600, 250, 130, 64, 401)]


@pytest.fixture(params=["small_chunks", "small_chunks_async"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Its pool holds less than half of the longest prompt."""
    found: Engine = request.getfixturevalue(request.param)
    return found


def expected(
    engine: Engine, prompt: list[int], num_tokens: int, method: str = "vote", budget: int = 40, **given: Any
) -> tuple[list[int], list[int]]:
    """What `compressing` says with the same cuts, and keeps of the prompt."""
    folder = Path(engine.llm.llm_engine.model_config.model)
    options = {"profile": folder / "profile.json"} if method == "vote" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with compresskv.compressing(model, method, budget, **{**options, **CHUNKS, **given}) as cache:
        tokens = [int(prefill(model, torch.tensor([prompt]), cache).argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(decode_one_token(model, tokens[-1], cache).argmax()))
        (positions,) = {tuple(layer.positions[0, 0].tolist()) for layer in cache.compressed_layers}
    return tokens, list(positions)


def test_as_compressing(engine: Engine) -> None:
    answers = engine.answers(PROMPTS, max_tokens=40)
    assert engine.max_running > 1
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        tokens, positions = expected(engine, prompt, 40)
        assert answer.tokens == tokens
        (kept,) = [kept for name, (_, kept) in engine.kept.items() if name.split("-")[0] == str(number)]
        assert kept == positions


def test_preempted_prompts_are_cut_alike(engine: Engine) -> None:
    """Between their cuts, and when they are answered: each time they are read from the beginning."""
    prompts, finished, num_steps = (PROMPTS[4], PROMPTS[1]), dict[str, list[int]](), 0
    for number, prompt in enumerate(prompts):
        engine.add(prompt, 20, str(number))
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs, num_steps = engine.step(), num_steps + 1
        finished |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs if output.finished}
        if num_steps in (4, 16):
            engine.preempt(engine.scheduler.running[-1])
    engine.check_clean()
    assert finished == {str(number): expected(engine, prompt, 20)[0] for number, prompt in enumerate(prompts)}


def test_a_long_window_is_all_of_the_prompts_end(tmp_path: Path) -> None:
    options, chunks = chunked_engine_options(tmp_path), {"chunk_budget": 90, "chunk_tokens": 96}
    options["compresskv"] = {"budget": 90, "method": "rkv_shared[window_size=80]", **chunks}
    (engine,) = start(**options)
    (answer,) = engine.answers([PROMPTS[4]], max_tokens=10)
    tokens, positions = expected(engine, PROMPTS[4], 10, "rkv_shared", 90, window_size=80, **chunks)
    assert engine.positions[-1] == positions
    assert answer.tokens == tokens


def test_no_more_is_held_than_a_chunk_and_what_stays(engine: Engine) -> None:
    held = []
    engine.add(PROMPTS[0], 20, "0")
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        held.append(engine.num_free - engine.pool.get_num_free_blocks())
    engine.check_clean()
    assert max(held) <= -(-(64 + 96 + 64) // 32) + (2 if engine.scheduler._manager.enable_caching else 0)


def test_what_the_pool_cannot_hold_is_cut_as_all_others(engine: Engine) -> None:
    """And an answer ends where the pool is full."""
    engine.scheduler._reasons.clear()
    whole, cut = engine.answers([PROMPTS[1], PROMPTS[0]], max_tokens=500, budget="off")
    assert len(whole.tokens) == 320 - 250
    assert len(cut.tokens) == 320 - 40
    assert list(engine.scheduler._reasons.elements()) == ["no room for what it asked for, cut as all others"]


@pytest.mark.parametrize("sampling", [{"prompt_logprobs": 1}, {"max_tokens": 20}])
def test_what_is_put_into_a_prompt_is_seen_by_nobody(engine: Engine, sampling: dict[str, int]) -> None:
    """Its tokens are told as they were given; who asks for their probabilities gets those, and cuts that see less."""
    engine.add(PROMPTS[4], request_id="0", **{"max_tokens": 20, **sampling})
    (request,) = engine.scheduler.requests.values()
    num_cuts = len(request.compresskv_specs) - 1
    num_put = 0 if "prompt_logprobs" in sampling else num_cuts * END_TOKENS
    assert request.num_prompt_tokens == len(PROMPTS[4]) + num_put
    finished = []
    while engine.llm.llm_engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
    engine.check_clean()
    assert num_cuts == 3
    assert finished[0].prompt_token_ids == PROMPTS[4]
    if "prompt_logprobs" in sampling:
        assert len(finished[0].prompt_logprobs) == len(PROMPTS[4])


@pytest.mark.parametrize(("num_prompt", "max_tokens", "num_tokens"), [(600, 81, 81), (600, 80, 80), (250, 600, 280)])
def test_an_answer_is_as_long_as_was_asked_for(
    engine: Engine, num_prompt: int, max_tokens: int, num_tokens: int
) -> None:
    """Where that leaves no room for the prompt's end, cuts are made without; the third is as long as the pool."""
    prompt = random.Random(2).choices(range(VOCAB_SIZE), k=num_prompt)
    engine.add(prompt, max_tokens, "0")
    (request,) = engine.scheduler.requests.values()
    has_room = num_prompt + 5 * END_TOKENS + max_tokens <= LONGEST_IN_CHUNKS or num_prompt < 600
    assert (request.num_prompt_tokens > num_prompt) == has_room
    finished = []
    while engine.llm.llm_engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
    engine.check_clean()
    assert len(finished[0].outputs[0].token_ids) == num_tokens


def test_the_least_answer_is_counted_from_the_prompts_end(engine: Engine) -> None:
    """A token that ends the answer, and is the likeliest all the time, comes when it may."""
    (answer,) = engine.answers([PROMPTS[4]], 20, min_tokens=5, stop_token_ids=[7], logit_bias={7: 100.0})
    assert answer.tokens.index(7) == 5
    assert len(answer.tokens) == 6
