"""The right tokens: plain vLLM's where all is kept, a masked full cache's where not, and our own engine's choice."""

from collections.abc import Iterator

import pytest
import torch
from engine import Answer, Engine, start
from reference import masked_logprobs, own_positions, ships_log
from vllm.exceptions import VLLMValidationError

from compresskv.methods.vote import Vote

LOG = ships_log()
PROMPTS = [LOG[:1500], LOG[2000:2900], LOG[1000:3311]]
TOLERANCE = 2e-4
"""Of log probabilities in float32, between two implementations of the model."""


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """vLLM as it is, with the embedded model, whose attention has something to find."""
    yield from start(None)


@pytest.fixture(scope="module")
def roomy() -> Iterator[Engine]:
    """As everywhere, with the embedded model."""
    yield from start({"budget": 200})


def errors_against(prompt: list[int], answer: Answer, kept: list[int] | None) -> tuple[int, float]:
    """Tokens that the reference would have chosen too, and the largest error of a log probability."""
    expected = masked_logprobs(prompt, answer.tokens, kept)
    tokens = torch.tensor(answer.tokens)
    own = expected.gather(1, tokens[:, None])[:, 0]
    return int((expected.argmax(dim=1) == tokens).sum()), float((own - torch.tensor(answer.logprobs)).abs().max())


def test_keeping_all_equals_plain_vllm(plain: Engine, roomy: Engine) -> None:
    """A wrong layout, length or slot would show."""
    expected = plain.answers(PROMPTS, max_tokens=20)
    for budget in ("off", 1.0):
        answers = roomy.answers(PROMPTS, max_tokens=20, budget=budget)
        assert not roomy.positions
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.tokens == wanted.tokens
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


def test_a_cut_prompt_answers_like_a_masked_full_cache(roomy: Engine) -> None:
    """Two prompts in one batch, in chunks, decoded across an edge between blocks."""
    answers = roomy.answers(PROMPTS[:2], max_tokens=60)
    unmasked_errors = []
    for prompt, answer, kept in zip(PROMPTS, answers, roomy.positions, strict=False):
        assert errors_against(prompt, answer, kept) == (60, pytest.approx(0, abs=TOLERANCE))
        unmasked_errors.append(errors_against(prompt, answer, None)[1])
    assert min(unmasked_errors) > 0.1  # the negative control: the mask matters


@pytest.mark.parametrize("budget", [40, 0.3, "3%"])
def test_the_positions_are_our_own_engines(roomy: Engine, budget: int | float | str) -> None:
    roomy.answers(PROMPTS[:2], max_tokens=1, budget=budget)
    number = 0.03 if budget == "3%" else budget
    assert roomy.positions == [own_positions(prompt, "vote", number) for prompt in PROMPTS[:2]]


def test_a_window_beyond_the_prompt(roomy: Engine) -> None:
    """Prompts of a few tokens, shorter than the window."""
    prompts = [LOG[:9], LOG[:2], LOG[:33]]
    answers = roomy.answers(prompts, max_tokens=10, budget=1)
    assert [len(kept) for kept in roomy.positions] == [1, 1, 1]
    for prompt, answer, kept in zip(prompts, answers, roomy.positions, strict=True):
        assert errors_against(prompt, answer, kept) == (10, pytest.approx(0, abs=TOLERANCE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("vote[local_weight=0,window_size=16]", {"local_weight": 0, "window_size": 16}),
        ("streaming_llm", {}),
    ],
)
def test_other_methods_and_options(label: str, options: dict[str, float]) -> None:
    engines = start({"budget": 100, "method": label}, max_model_len=2048, max_num_batched_tokens=500)
    engine = next(engines)
    if label.startswith("vote"):
        layers = {layer for layer, _ in engine.runner.compaction._methods[False].profile.best_heads[: Vote.num_heads]}
        assert set(engine.runner.compaction._read[False]) == layers  # nothing is copied from the others
    engine.answers(PROMPTS[:2], max_tokens=4)
    assert engine.positions == [
        own_positions(prompt, label.split("[", maxsplit=1)[0], 100, **options) for prompt in PROMPTS[:2]
    ]
    engines.close()


def test_a_batch_equals_each_alone(roomy: Engine) -> None:
    together = roomy.answers(PROMPTS, max_tokens=20)
    positions = sorted(roomy.positions)
    alone, alone_positions = [], []
    for prompt in PROMPTS:
        alone += roomy.answers([prompt], max_tokens=20)
        alone_positions += roomy.positions
    assert sorted(alone_positions) == positions
    assert [answer.tokens for answer in alone] == [answer.tokens for answer in together]


def test_requests_have_budgets_of_their_own(roomy: Engine) -> None:
    """Cut and whole ones decode in the same batch."""
    budgets = [64, "off", {"budget": "10%"}, None]
    for number, budget in enumerate(budgets):
        roomy.add(PROMPTS[1], 30, str(number), budget)
    roomy.positions.clear()
    finished = {}
    while roomy.llm.llm_engine.has_unfinished_requests():
        finished |= {one.request_id: list(one.outputs[0].token_ids) for one in roomy.step() if one.finished}
    roomy.check_clean()
    assert sorted(map(len, roomy.positions)) == [64, 90, 200]
    for number, budget in enumerate(budgets):
        assert roomy.answers([PROMPTS[1]], 30, budget)[0].tokens == finished[str(number)]


@pytest.mark.parametrize("budget", [0, "none", {"window": 3}, [100, 200], 1.5, 2**63])
def test_a_bad_budget_fails_its_request_alone(roomy: Engine, budget: object) -> None:
    with pytest.raises(VLLMValidationError, match=r"budget|compresskv"):
        roomy.answers([PROMPTS[1]], budget=budget)
    assert roomy.answers([PROMPTS[1]], max_tokens=2)
