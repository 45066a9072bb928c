"""Prompts larger than the pool, cut while they are read: tokens and positions are those of `compressing`."""

import random
from pathlib import Path

import pytest
import torch
from engine import Engine
from random_model import CHUNKS, LONGEST, VOCAB_SIZE
from transformers import AutoModelForCausalLM

import compresskv
from compresskv.models.decoding import decode_one_token, prefill

PROMPTS = [random.Random(1).choices(range(VOCAB_SIZE), k=length) for length in (600, 250, 130, 64, 401)]


@pytest.fixture(params=["small_chunks", "small_chunks_async"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Its pool holds less than half of the longest prompt."""
    found: Engine = request.getfixturevalue(request.param)
    return found


def expected(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[list[int], list[int]]:
    """What `compressing` says with the same cuts, and keeps of the prompt."""
    folder = Path(engine.llm.llm_engine.model_config.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with compresskv.compressing(model, "vote", 40, profile=folder / "profile.json", **CHUNKS) as cache:
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


def test_no_more_is_held_than_a_chunk_and_what_stays(engine: Engine) -> None:
    held = []
    engine.add(PROMPTS[0], 20, "0")
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        held.append(engine.num_free - engine.pool.get_num_free_blocks())
    engine.check_clean()
    assert max(held) <= -(-(64 + 96 + 31) // 32) + (2 if engine.scheduler._manager.enable_caching else 0)


def test_what_the_pool_cannot_hold_is_cut_as_all_others(engine: Engine) -> None:
    """And an answer ends where the pool is full."""
    engine.scheduler._reasons.clear()
    whole, cut = engine.answers([PROMPTS[1], PROMPTS[0]], max_tokens=500, budget="off")
    assert len(whole.tokens) == 288 - 250
    assert len(cut.tokens) == LONGEST + 100 - 600 == 100
    assert list(engine.scheduler._reasons.elements()) == ["no room for what it asked for, cut as all others"]
