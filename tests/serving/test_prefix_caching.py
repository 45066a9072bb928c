"""Prefix caching: prompts that share a beginning, each cut into blocks of its own, the originals cached as they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, start
from random_model import readable_engine_options
from reference import ships_log

from compresskv.serving.counters import counters

LOG = ships_log()
SHARED = [LOG[:1000] + LOG[offset : offset + 300] for offset in (1000, 2000, 3000)]
PROMPTS = [*SHARED, SHARED[0]]
"""Eight blocks in common, each with an end of its own; the last is the first once more."""


@pytest.fixture(scope="module")
def caching(readable: Path) -> Iterator[Engine]:
    """As `roomy`, with prefix caching."""
    yield from start(**readable_engine_options(readable, budget=200), enable_prefix_caching=True)


def num_computed(engine: Engine, prompt: list[int], budget: object = None, max_tokens: int = 2) -> int:
    """Prompt tokens that were read, not found."""
    engine.add(prompt, max_tokens, "0", budget)
    found = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            found = output.num_cached_tokens or found
    return len(prompt) - found


def test_shared_beginnings_are_read_once_and_never_changed(caching: Engine, roomy: Engine) -> None:
    """The same answers and positions as without caching, one after another and all at once, in any order."""
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = roomy.answers(prompts)
        for answers, positions in (
            (caching.answers(prompts), list(caching.positions)),
            ([caching.answers([prompt])[0] for prompt in prompts], None),
        ):
            assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
            assert positions is None or sorted(positions) == sorted(roomy.positions)
    assert num_computed(caching, SHARED[1]) == 1300 - 9 * 128  # ten blocks are cached; the window lies in the tenth


def test_whole_prompts_use_what_cut_ones_left(caching: Engine, roomy: Engine) -> None:
    """What a cut moved away is still there for a request that keeps all, and the other way round."""
    prompt = LOG[500:1900]
    for budget in (None, "off", None, 64, "off"):
        assert caching.answers([prompt], budget=budget)[0].tokens == roomy.answers([prompt], budget=budget)[0].tokens
    assert num_computed(caching, prompt, "off") == 1400 - 10 * 128


def test_decoding_is_not_cached(caching: Engine, roomy: Engine) -> None:
    """Blocks behind a cut hold other tokens than their place says: nobody may find them."""
    prompt = LOG[3000:3900]
    answer = caching.answers([prompt], max_tokens=300)[0].tokens
    longer = [*prompt, *answer]
    assert num_computed(caching, longer, "off") == len(longer) - 7 * 128
    assert caching.answers([longer], budget="off")[0].tokens == roomy.answers([longer], budget="off")[0].tokens


def test_blocks_that_others_share_are_not_counted_as_freed(caching: Engine) -> None:
    """A whole prompt decodes; the same, cut, shares nine of its blocks, and takes as many fresh ones as it frees."""
    caching.add(SHARED[2], 30, "0", "off")
    for _ in range(4):
        caching.step()
    before = {name: counters().total(name) for name in ("evicted_tokens", "freed_blocks")}
    num_free = caching.pool.get_num_free_blocks()
    caching.add(SHARED[2], 3, "1")
    caching.step()
    assert caching.pool.get_num_free_blocks() == num_free - 2  # 200 tokens
    grown = {name: counters().total(name) - value for name, value in before.items()}
    assert grown == {"evicted_tokens": 1100, "freed_blocks": 0}
    while caching.llm.llm_engine.has_unfinished_requests():
        caching.step()
    caching.check_clean()


@pytest.fixture(scope="module")
def tight(readable: Path) -> Iterator[Engine]:
    """13 blocks, and prompts that are cut to one."""
    pool = {"num_gpu_blocks_override": 14, "max_model_len": 1664}
    yield from start(**readable_engine_options(readable, budget=120), enable_prefix_caching=True, **pool)


def test_a_preempted_request_comes_back_into_a_tight_pool(tight: Engine) -> None:
    """Prompt and answer need 13 blocks then, of which most are found in the cache; the cut's own is no 14th."""
    expected = tight.answers([LOG[:1500]], max_tokens=60)[0].tokens
    tight.positions.clear()
    tight.add(LOG[:1500], 60, "0")
    while sum(request.num_output_tokens for request in tight.scheduler.running) < 45:
        tight.step()
    tight.preempt(tight.scheduler.running[-1])
    answer: list[int] = []
    for _ in range(20):  # of which one reads the prompt's end again, one the 45 tokens, and 15 go on
        for output in tight.step():
            answer = list(output.outputs[0].token_ids)
    tight.llm.llm_engine.abort_request(["0"])  # where it never came back
    tight.step()
    assert answer == expected
    assert [len(kept) for kept in tight.positions] == [120, 120]
    tight.check_clean()


def test_a_pool_without_room_for_fresh_blocks(tight: Engine) -> None:
    """A prompt of 12 blocks can be cut to one; one of 13 could not, and is kept whole. Preempted ones come back."""
    tight.answers([LOG[:1500]], max_tokens=5)
    assert [len(kept) for kept in tight.positions] == [120]
    tight.answers([LOG[:1600]], max_tokens=5)
    assert not tight.positions
    prompts = [LOG[start : start + 800] for start in (0, 700, 1400, 2100)]
    together = tight.answers(prompts, max_tokens=150)
    assert len(tight.positions) >= len(prompts)
    assert [answer.tokens for answer in together] == [tight.answers([prompt], 150)[0].tokens for prompt in prompts]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_aborted_requests_give_fresh_blocks_back(caching: Engine, after: int) -> None:
    caching.add(LOG[1234:2600], 50, "0")
    for _ in range(after):
        caching.step()
    caching.llm.llm_engine.abort_request(["0"])
    caching.step()
    caching.check_clean()
