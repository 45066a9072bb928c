"""Positions and tokens are those of `compressing`, for a tiny model, with each of vLLM's runners and ways to schedule.

`test_equality` has a real model, which takes minutes where kernels are interpreted.
"""

import random
from pathlib import Path

import pytest
import torch
from engine import Engine
from random_model import VOCAB_SIZE
from transformers import AutoModelForCausalLM

import compresskv
from compresskv.models.decoding import decode_one_token, prefill

PROMPTS = [random.Random(1).choices(range(VOCAB_SIZE), k=length) for length in (250, 130, 301, 64)]
NUM_TOKENS = 40  # over an edge between blocks


@pytest.mark.parametrize("name", ["small", "small_caching", "small_async"])
@pytest.mark.parametrize("budget", [40, 0.3])
def test_as_compressing(name: str, budget: int | float, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    answers = engine.answers(PROMPTS, max_tokens=NUM_TOKENS, budget=budget)
    expected = [compressed(engine, prompt, budget) for prompt in PROMPTS]
    assert [answer.tokens for answer in answers] == [tokens for tokens, _ in expected]
    assert sorted(engine.positions) == sorted(positions for _, positions in expected)


def compressed(engine: Engine, prompt: list[int], budget: int | float) -> tuple[list[int], list[int]]:
    """What `compressing` says, and keeps of the prompt."""
    folder = Path(engine.llm.llm_engine.model_config.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with compresskv.compressing(model, "vote", budget, profile=folder / "profile.json", candidates=None) as cache:
        tokens = [int(prefill(model, torch.tensor([prompt]), cache).argmax())]
        while len(tokens) < NUM_TOKENS:
            tokens.append(int(decode_one_token(model, tokens[-1], cache).argmax()))
        (positions,) = {tuple(layer.positions[0, 0].tolist()) for layer in cache.compressed_layers}
    return tokens, list(positions)
