"""Whatever is asked, whenever it is aborted or preempted: the engine goes on, answers, and gets every block back."""

import math
import random
from dataclasses import dataclass

import pytest
from engine import Engine
from random_model import LONGEST, VOCAB_SIZE

BUDGETS = [1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 200, "1%", "30%", 1.0, "off", None]


@dataclass
class Asked:
    """A request that was sent."""

    prompt: list[int]
    max_tokens: int
    budget: object


ENGINES = ["small", "small_caching", "small_async", "small_chunks_async", "small_answers"]
IN_OTHER_PAIRS = [pytest.param(name, marks=pytest.mark.slow) for name in ("small_chunks", "small_answers_async")]


@pytest.fixture(params=[*ENGINES, *IN_OTHER_PAIRS])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Without prefix caching, with it, where steps are scheduled ahead, where prompts are larger than the pool, and
    where what is generated is cut.
    """
    found: Engine = request.getfixturevalue(request.param)
    return found


def most_tokens(engine: Engine, asked: Asked) -> float:
    """An answer ends where the pool is full, if prompts may be longer than that."""
    room = engine.num_free * engine.scheduler.block_size - len(asked.prompt)
    ends = engine.scheduler._settings.chunks and not engine.scheduler._settings.decode and asked.budget == "off"
    return room if ends and room >= 0 else math.inf


def ask(engine: Engine, requests: int, seed: int) -> None:
    """Send requests of all kinds, abort some, preempt others, and wait for the rest."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(VOCAB_SIZE) for _ in range(LONGEST)] for _ in range(3)]
    open_requests: dict[str, Asked] = {}
    num_sent = num_idle = 0
    while num_sent < requests or open_requests:
        while num_sent < requests and draw.random() < 0.6:
            shared, length = (
                draw.choice(beginnings),
                draw.choice([1, 2, 3, 33, 100, 101, LONGEST, draw.randint(1, LONGEST)]),
            )
            cut = draw.randint(0, length)
            prompt = shared[:cut] + [draw.randrange(VOCAB_SIZE) for _ in range(length - cut)]
            asked = Asked(prompt, draw.choice([1, 2, 10, draw.randint(1, 90)]), draw.choice(BUDGETS))
            name = f"{seed}-{num_sent}"
            engine.add(asked.prompt, asked.max_tokens, name, asked.budget)
            open_requests[name] = asked
            num_sent += 1
        if open_requests and draw.random() < 0.1:
            name = draw.choice(sorted(open_requests))
            engine.llm.llm_engine.abort_request([name])
            del open_requests[name]
        if engine.scheduler.running and draw.random() < 0.1:
            engine.preempt(draw.choice(engine.scheduler.running))
        before = sum(request.num_computed_tokens for request in engine.scheduler.requests.values())
        for output in engine.step():
            if output.finished:
                asked = open_requests.pop(output.request_id)
                assert len(output.outputs[0].token_ids) == min(asked.max_tokens, most_tokens(engine, asked))
        after = sum(request.num_computed_tokens for request in engine.scheduler.requests.values())
        num_idle = num_idle + 1 if after == before and open_requests else 0
        assert num_idle < 50, f"no request goes on: {open_requests}"
    engine.step()
    engine.check_clean()


def test_no_request_ends_the_engine(engine: Engine) -> None:
    ask(engine, 20 if engine.is_v2 else 60, seed=0)  # its kernels are interpreted
    assert engine.positions
    engine.positions.clear()


@pytest.mark.slow
def test_none_of_2000_requests_ends_the_engine(engine: Engine) -> None:
    for seed in range(1, 6):
        ask(engine, 200, seed)
    engine.positions.clear()
