"""Caches do not see each other, and a model is left as it was found: in nested contexts, after errors, in threads."""

import contextvars
import copy
import gc
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer
from transformers.cache_utils import DynamicSlidingWindowLayer

import compresskv
import tiny
from compresskv import CacheStateError, CompressedCache
from compresskv.cache.full import branch
from compresskv.compression import Compressing
from compresskv.methods.snapkv import SnapKV

NUM_PROMPT = 60
STEPS = [NUM_PROMPT, 1, 1, 1, 5, 1, 1]
# pairs of (method, budget) that are in use at one time
PAIRS = [
    (("snapkv", 20), ("streaming_llm", 0.3)),
    (("compresskv", 40), ("compresskv", 12)),
    (("pyramidkv", 0.4), ("full", 1)),
]


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.tiny_model(request.param)


def context(model: PreTrainedModel, method: str = "snapkv", budget: float = 20) -> Compressing:
    return compresskv.compressing(model, method, budget, **tiny.options_for(model, method))


def sequence(seed: int) -> Tensor:
    return tiny.random_tokens(sum(STEPS), seed=seed)


def prompt(seed: int) -> Tensor:
    return tiny.random_tokens(NUM_PROMPT, seed=seed)


def logits_alone(model: PreTrainedModel, method: str, budget: float, seed: int) -> Tensor:
    with context(model, method, budget) as cache:
        return tiny.read(model, cache, sequence(seed), STEPS)


def tokens_alone(model: PreTrainedModel, seed: int, **options: Any) -> list[list[int]]:
    with context(model, **options) as cache:
        return tiny.generate(model, prompt(seed), cache).tolist()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(f"{method}-{budget}" for method, budget in pair))
def test_two_caches_of_one_model_interleaved_step_by_step_are_as_if_alone(model: PreTrainedModel, pair: Any) -> None:
    logits: list[list[Tensor]] = [[], []]
    with context(model, *pair[0]) as first, context(model, *pair[1]) as second:
        for num_new in STEPS:
            for i, cache in enumerate((first, second)):
                logits[i].append(tiny.read(model, cache, sequence(i), [num_new]))
    for i in range(2):
        assert torch.equal(torch.cat(logits[i], dim=1), logits_alone(model, *pair[i], seed=i))


@pytest.mark.parametrize(("family", "method"), [*(("llama", name) for name in tiny.METHODS), ("gemma3", "blend")])
def test_a_users_default_device_may_be_another(family: str, method: str) -> None:
    model = tiny.tiny_model(family)
    with context(model, method) as cache:
        expected = tiny.read(model, cache, sequence(0), STEPS)
    tokens = sequence(0)
    with torch.device("meta"), context(model, method) as cache:  # what is made there holds no numbers
        found = tiny.read(model, cache, tokens, STEPS)
    assert torch.equal(found, expected)


def test_layers_of_two_caches_may_alternate_inside_a_step(model: PreTrainedModel) -> None:
    # An exception between a layer's update and its attention leaves that layer noted as the one that waits.
    with context(model) as stale, context(model) as cache:
        stale.compressed_layers[0].update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
        tokens = tiny.generate(model, prompt(0), cache).tolist()
        assert tiny.generate(model, prompt(0)).tolist() != tokens, "a plain call is not routed to the stale layer"
    assert tokens == tokens_alone(model, 0)


def test_an_outer_context_goes_on_after_an_inner_one_ended(model: PreTrainedModel) -> None:
    with context(model, "snapkv", 20) as outer:
        before = tiny.read(model, outer, sequence(0), STEPS[:3])
        with context(model, "streaming_llm", 30) as inner:
            tiny.read(model, inner, sequence(1), STEPS)
        after = tiny.read(model, outer, sequence(0), STEPS[3:])
    assert torch.equal(torch.cat([before, after], dim=1), logits_alone(model, "snapkv", 20, seed=0))


def test_one_context_object_may_be_entered_again_and_inside_itself(model: PreTrainedModel) -> None:
    again = context(model)
    with again as first:
        tokens = tiny.generate(model, prompt(0), first).tolist()
        with again as inner:
            assert tiny.generate(model, prompt(0), inner).tolist() == tokens
        assert model.config._attn_implementation == "compresskv_sdpa"
    assert model.config._attn_implementation == "sdpa"
    with again as later:
        assert tiny.generate(model, prompt(0), later).tolist() == tokens
    assert len({id(first), id(inner), id(later)}) == 3


# In older transformers a sliding-window layer's own reset() leaves zeros behind that count as tokens.
def test_reset_makes_room_for_another_prompt(model: PreTrainedModel) -> None:
    longer = tiny.random_tokens(NUM_PROMPT + 30, seed=5)
    padded, mask = tiny.left_padded([prompt(1), tiny.random_tokens(25, seed=2)])
    with context(model, budget=0.3) as cache:
        first = tiny.generate(model, prompt(0), cache).tolist()
        runs: list[tuple[Tensor, dict[str, Any]]] = [(longer, {}), (padded, {"attention_mask": mask}), (prompt(0), {})]
        for tokens, options in runs:
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.nbytes == cache.full_nbytes == 0
            again = tiny.generate(model, tokens, cache, **options).tolist()
            with context(model, budget=0.3) as fresh:
                assert again == tiny.generate(model, tokens, fresh, **options).tolist()
    assert again == first


def test_an_exception_restores_the_model(model: PreTrainedModel) -> None:
    plain = tiny.generate(model, prompt(0)).tolist()

    def fail() -> None:
        with context(model), context(model) as cache:
            tiny.read(model, cache, sequence(0), STEPS[:2])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert model.config._attn_implementation == "sdpa"
    assert tiny.generate(model, prompt(0)).tolist() == plain


def test_an_exception_while_entering_restores_the_model(model: PreTrainedModel) -> None:
    with pytest.raises(compresskv.ConfigError), compresskv.compressing(model, "snapkv", [5]):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_an_exception_inside_the_model_leaves_other_caches_usable(model: PreTrainedModel) -> None:
    class Failing(SnapKV):
        def score(self, inputs: Any) -> Tensor:
            raise ZeroDivisionError("broken method")

    with context(model) as cache, compresskv.compressing(model, Failing(), 20) as failing:
        with pytest.raises(ZeroDivisionError, match="broken method"):
            tiny.read(model, failing, sequence(0), [NUM_PROMPT])
        assert tiny.generate(model, prompt(0), cache).tolist() == tokens_alone(model, 0)


def test_generate_works_as_before_inside_without_the_cache_and_after_leaving(model: PreTrainedModel) -> None:
    padded, mask = tiny.left_padded([prompt(1), tiny.random_tokens(25, seed=2)])
    plain = tiny.generate(model, padded, attention_mask=mask).tolist()
    with context(model) as cache:
        tiny.generate(model, prompt(0), cache)
        assert tiny.generate(model, padded, attention_mask=mask).tolist() == plain
    assert tiny.generate(model, padded, attention_mask=mask).tolist() == plain


@pytest.mark.parametrize("steps_inside", [0, 1, 3])
@pytest.mark.parametrize("copied", [False, True])
def test_a_cache_used_outside_its_context_is_refused(model: PreTrainedModel, steps_inside: int, copied: bool) -> None:
    # Outside, nothing would evict and the masks would not fit. A copy must not carry its own idea of the context along.
    with context(model) as original:
        if steps_inside:
            tiny.read(model, original, sequence(0), STEPS[:steps_inside])
        cache = copy.deepcopy(original) if copied else original
    with pytest.raises(CacheStateError, match="inside") as raised:
        tiny.read(model, cache, sequence(0), STEPS[steps_inside : steps_inside + 1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_copied_cache_goes_on_identically_and_apart(model: PreTrainedModel, method: str) -> None:
    with context(model, method, 20) as cache:
        tiny.read(model, cache, sequence(0), STEPS[:3])
        twin = copy.deepcopy(cache)
        assert not torch.equal(
            tiny.read(model, twin, torch.cat([sequence(0)[:, :-9], sequence(1)], dim=1), [7]),
            tiny.read(model, cache, sequence(0), [7]),
        )
        twin = copy.deepcopy(cache)
        assert torch.equal(tiny.read(model, twin, sequence(0), [1]), tiny.read(model, cache, sequence(0), [1]))
        twin.reset()
        assert cache.get_seq_length() == sum(STEPS[:3]) + 8


# A branch shares tensors: whatever one of the two does must make new ones.
@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_branch_goes_on_apart_and_leaves_the_original_untouched(model: PreTrainedModel, method: str) -> None:
    with context(model, method, 0.4) as cache:
        tiny.read(model, cache, sequence(0), STEPS[:3])
        nbytes, counts = cache.nbytes, tiny.kept_counts(cache)
        twin, other = branch(cache), branch(cache)
        ours = tiny.read(model, twin, sequence(0), STEPS[3:])
        tiny.read(model, other, torch.cat([sequence(0)[:, :-8], sequence(1)], dim=1), [5, 1, 2])
        other.reorder_cache(torch.tensor([0]))
        if not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in other.layers):
            other.crop(-3)
        other.batch_repeat_interleave(2)
        other.reset()
        assert cache.nbytes == nbytes
        assert torch.equal(tiny.kept_counts(cache), counts)
        assert torch.equal(tiny.read(model, cache, sequence(0), STEPS[3:]), ours)
    assert torch.equal(ours, logits_alone(model, method, 0.4, seed=0)[:, sum(STEPS[:3]) :])


# The attention function finds its cache through the thread that runs it; the model's config is shared by all.
def test_threads_with_their_own_caches_and_plain_calls_do_not_disturb_each_other(model: PreTrainedModel) -> None:
    jobs: list[dict[str, Any] | None] = [{"method": "snapkv", "budget": 20}, {"method": "streaming_llm"}, None] * 2
    expected = [
        tiny.generate(model, prompt(seed)).tolist() if job is None else tokens_alone(model, seed, **job)
        for seed, job in enumerate(jobs)
    ]
    start = threading.Barrier(len(jobs))

    def work(seed: int) -> list[Any]:
        start.wait(timeout=60)
        job = jobs[seed]
        if job is None:
            return [tiny.generate(model, prompt(seed)).tolist() for _ in range(4)]
        return [tokens_alone(model, seed, **job) for _ in range(4)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for seed, results in enumerate(pool.map(work, range(len(jobs)))):
            assert results == [expected[seed]] * 4, f"thread {seed}: {jobs[seed]}"
    assert model.config._attn_implementation == "sdpa"


class NumbersTokenizer:
    """Just enough of a tokenizer for TextIteratorStreamer: a token's text is its number and a blank."""

    def decode(self, token_ids: Any, **_: Any) -> str:
        return "".join(f"{token} " for token in token_ids)


def test_generation_in_a_worker_thread_can_be_streamed(model: PreTrainedModel) -> None:
    streamer = TextIteratorStreamer(NumbersTokenizer(), skip_prompt=True, timeout=60)  # type: ignore[arg-type]
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def work(cache: CompressedCache) -> None:
        try:
            tiny.generate(model, prompt(0), cache, streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - reported in the main thread
            errors.put(error)
            streamer.end()

    with context(model) as cache:
        thread = threading.Thread(target=work, args=(cache,))
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert errors.empty(), errors.get()
    assert [list(map(int, text.split()))] == tokens_alone(model, 0)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
def test_decoding_goes_on_outside_the_inference_mode_it_began_in(model: PreTrainedModel, method: str) -> None:
    sequence, steps = tiny.random_tokens(80), [70, 1, 1, 1, 3]
    with compresskv.compressing(model, method, 24) as cache:
        expected = tiny.read(model, cache, sequence, steps)
    with compresskv.compressing(model, method, 24) as cache:
        with torch.inference_mode():
            tiny.read(model, cache, sequence, steps[:2])
        logits = tiny.read(model, cache, sequence, steps[2:])
    torch.testing.assert_close(logits, expected[:, 71:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
def test_gradients_reach_through_several_steps(model: PreTrainedModel, method: str) -> None:
    sequence = tiny.random_tokens(74)
    with compresskv.compressing(model, method, 24) as cache:
        tiny.read(model, cache, sequence, [70])
        total = torch.zeros(())
        for token in range(70, 74):
            output = model(input_ids=sequence[:, token : token + 1], past_key_values=cache, use_cache=True)
            total = total + output.logits.float().logsumexp(-1).sum()
        total.backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_a_task_that_was_begun_inside_holds_no_cache() -> None:
    model = tiny.tiny_model("llama")
    with compresskv.compressing(model, "snapkv", 12) as cache:
        tiny.read(model, cache, tiny.random_tokens(60), [60])
        task = contextvars.copy_context()
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None

    def go_on() -> int:
        with compresskv.compressing(model, "snapkv", 12) as another:
            tiny.read(model, another, tiny.random_tokens(60), [60])
            return another.compressed_layers[0].num_retained

    assert task.run(go_on) == 12
