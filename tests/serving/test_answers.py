"""Answers that are cut while they are generated: tokens and positions are those of `compressing`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from random_model import CHUNKS, DECODING, VOCAB_SIZE
from transformers import AutoModelForCausalLM

import compresskv
from compresskv.models.decoding import decode_one_token, prefill
from compresskv.serving.counters import counters

PROMPTS = [random.Random(1).choices(range(VOCAB_SIZE), k=length) for length in (301, 64, 5)]
NUM_TOKENS = 70


@pytest.fixture(params=["small_answers", "small_answers_async"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """With prompts that are cut while they are read, and with prefix caching, scheduled ahead."""
    found: Engine = request.getfixturevalue(request.param)
    return found


def expected(engine: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """What `compressing` says with the same cuts, and holds after the last one."""
    folder = Path(engine.llm.llm_engine.model_config.model)
    chunks: dict[str, Any] = CHUNKS if engine.scheduler._settings.chunks else {}
    options = {"profile": folder / "profile.json", **chunks, **DECODING, "decode_method": "rkv_shared"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with compresskv.compressing(model, "vote", 40, **options) as cache:
        tokens = [int(prefill(model, torch.tensor([prompt]), cache).argmax())]
        while len(tokens) < NUM_TOKENS:
            tokens.append(int(decode_one_token(model, tokens[-1], cache).argmax()))
        (positions,) = {tuple(layer.positions[0, 0].tolist()) for layer in cache.compressed_layers}
    return tokens, list(positions)


def test_as_compressing(engine: Engine) -> None:
    answers = engine.answers(PROMPTS, max_tokens=NUM_TOKENS)
    assert engine.max_running > 1
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        tokens, positions = expected(engine, prompt)
        assert answer.tokens == tokens
        (kept,) = [kept for name, (_, kept) in engine.kept.items() if name.split("-")[0] == str(number)]
        assert kept == positions


def test_preempted_answers_are_cut_at_the_same_places(engine: Engine) -> None:
    (alone,) = engine.answers([PROMPTS[1]], max_tokens=NUM_TOKENS)
    kept = list(engine.kept.values())
    engine.kept.clear()
    engine.add(PROMPTS[1], NUM_TOKENS, "0")
    num_steps, outputs = 0, []
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs = engine.step()
        num_steps += 1
        if num_steps in (30, 61) and engine.scheduler.running:
            engine.preempt(engine.scheduler.running[0])
    engine.check_clean()
    assert list(outputs[0].outputs[0].token_ids) == alone.tokens
    assert list(engine.kept.values()) == kept


def test_no_more_is_held_than_the_budget_and_an_interval(engine: Engine) -> None:
    before = counters().total("cut_answers")
    engine.add(PROMPTS[1], 200, "0")
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        held.append(engine.num_free - engine.pool.get_num_free_blocks())
    engine.check_clean()
    assert max(held) <= -(-(48 + 16) // 32) + (2 if engine.scheduler._manager.enable_caching else 0)
    assert counters().total("cut_answers") - before == len([read for read in range(16, 200, 16) if 40 + read > 48])


def test_what_is_kept_whole_is_not_cut_later(engine: Engine) -> None:
    assert len(engine.answers([PROMPTS[1]], max_tokens=60, budget="off")[0].tokens) == 60
    assert not engine.positions


def test_a_preempted_answer_that_others_asked_about_is_cut_all_the_same(small_answers_async: Engine) -> None:
    """Their prompt holds what it had said, so that the prefix cache has blocks beyond its cuts."""
    engine = small_answers_async
    (alone,) = engine.answers([PROMPTS[2]], max_tokens=NUM_TOKENS)
    cuts = list(engine.positions)
    engine.answers([[*PROMPTS[2], *alone.tokens]], max_tokens=1, budget="off")
    engine.positions.clear()
    engine.add(PROMPTS[2], NUM_TOKENS, "0")
    num_steps, outputs = 0, []
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs = engine.step()
        num_steps += 1
        if num_steps == 68:
            engine.positions.clear()
            engine.preempt(engine.scheduler.running[0])
    engine.check_clean()
    assert list(outputs[0].outputs[0].token_ids) == alone.tokens
    assert engine.positions == cuts
