"""With vLLM's cache in fp8: tokens and positions are those of `compressing` with keys and values rounded as vLLM does.

Decode budgets, prompts larger than the pool, prefix caching, steps scheduled ahead and preemption are all in it.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Answer, Engine, answer_of, start
from random_model import CHUNKS, DECODING, VOCAB_SIZE, chunked_engine_options, small_engine_options
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.platforms import current_platform

import compresskv
from compresskv.cache.routed import RoutedCache
from compresskv.models.decoding import decode_one_token, prefill
from compresskv.serving.numbers import Numbers
from compresskv.serving.pages import find_layout
from compresskv.serving.refusals import has_fp8_caches

pytestmark = [
    pytest.mark.skipif(not current_platform.is_cpu(), reason="fp8 caches are refused on GPUs"),
    pytest.mark.skipif(not has_fp8_caches(), reason="vLLM has no fp8 cache on this processor: it needs AVX-512 or AMX"),
]
PROMPTS = [random.Random(1).choices(range(VOCAB_SIZE), k=length) for length in (301, 64, 5)]
NUM_TOKENS = 70
TOLERANCE = 0.1
"""Of log probabilities: what one number that rounds to its other neighbour may change, of some 100,000."""


@pytest.fixture(scope="module", params=["fp8", "fp8_e5m2"])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of an engine with prefix caching, scheduled ahead, and of one whose prompts are cut while they are read."""
    if request.param == "fp8":
        found = small_engine_options(tmp_path_factory.mktemp("small"))
        found |= {"enable_prefix_caching": True, "asynchronous": True}
    else:
        found = chunked_engine_options(tmp_path_factory.mktemp("small"))
    found["compresskv"] |= DECODING
    return found | {"kv_cache_dtype": request.param}


@pytest.fixture(scope="module")
def engine(options: dict[str, Any]) -> Iterator[Engine]:
    """Answers are cut, too."""
    yield from start(**options)


@pytest.fixture(scope="module")
def plain(options: dict[str, Any]) -> Iterator[Engine]:
    """vLLM as it is, with room for the longest prompt."""
    yield from start(**options | {"compresskv": None, "num_gpu_blocks_override": 64})


def rounded(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What keys and values (1, H, T, D) are to attention once vLLM has put them into a layer's cache."""
    block_size, num_tokens = layer.kv_cache.shape[2], keys.shape[2]
    pages = layer.kv_cache.new_zeros(math.ceil(num_tokens / block_size), *layer.kv_cache.shape[1:])
    given = [tensor[0].transpose(0, 1).contiguous() for tensor in (keys, values)]
    layer.impl.do_kv_cache_update(layer, *given, pages, torch.arange(num_tokens))
    layout, fp8 = find_layout(layer, block_size), Numbers.of(layer).fp8
    assert fp8 is not None
    kept = pages.flatten(1).view(fp8).float()
    scales = (layer._k_scale_float, layer._v_scale_float)
    found = [
        (kept[:, places] * scale).flatten(0, 1)[:num_tokens]
        for places, scale in zip((layout.keys, layout.values), scales, strict=True)
    ]
    return found[0].transpose(0, 1)[None], found[1].transpose(0, 1)[None]


def expected(
    engine: Engine, prompt: list[int], answer: list[int], *, rounds: bool = True
) -> tuple[list[float], list[int]]:
    """What `compressing` says of the tokens of an answer with the same cuts, and holds after the last one.

    Args:
        rounds: give it keys and values as attention in vLLM sees them.
    """
    folder = Path(engine.llm.llm_engine.model_config.model)
    chunks: dict[str, Any] = CHUNKS if engine.scheduler._settings.chunks else {}
    options = {"profile": folder / "profile.json", **chunks, **DECODING, "decode_method": "rkv_shared"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, update = engine.runner._layers(), RoutedCache.update

    def rounding(cache: RoutedCache, keys: Tensor, values: Tensor, layer_idx: int, *others: Any) -> Any:
        return update(cache, *rounded(layers[layer_idx], keys, values), layer_idx, *others)

    with pytest.MonkeyPatch.context() as patch, compresskv.compressing(model, "vote", 40, **options) as cache:
        if rounds:
            patch.setattr(RoutedCache, "update", rounding)
        logits = [prefill(model, torch.tensor([prompt]), cache)]
        logits += [decode_one_token(model, token, cache) for token in answer[:-1]]
        (positions,) = {tuple(layer.positions[0, 0].tolist()) for layer in cache.compressed_layers}
    found = [float(one.flatten().log_softmax(-1)[token]) for one, token in zip(logits, answer, strict=True)]
    return found, list(positions)


def check(engine: Engine, answers: list[Answer]) -> None:
    """Tokens, by their probabilities, and positions. Exactly they need not be: near an edge, other bits round apart."""
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        logprobs, positions = expected(engine, prompt, answer.tokens)
        assert answer.logprobs == pytest.approx(logprobs, abs=TOLERANCE)
        (kept,) = [kept for name, (_, kept) in engine.kept.items() if name.split("-")[0] == str(number)]
        assert len(set(kept) - set(positions)) <= 1


def test_as_compressing(engine: Engine) -> None:
    """And so where prefix caching finds a prompt's beginning."""
    (group,) = engine.runner.kv_cache_config.kv_cache_groups
    assert group.kv_cache_spec.page_size_bytes == 32 * 2 * 2 * 32  # tokens, keys and values, heads, channels
    answers = engine.answers(PROMPTS, max_tokens=NUM_TOKENS)
    check(engine, answers)
    unrounded, _ = expected(engine, PROMPTS[0], answers[0].tokens, rounds=False)
    errors = [abs(one - own) for one, own in zip(unrounded, answers[0].logprobs, strict=True)]
    assert max(errors) > 5 * TOLERANCE  # the negative control: it matters what they are rounded to
    if engine.scheduler._manager.enable_caching:
        check(engine, engine.answers(PROMPTS, max_tokens=NUM_TOKENS))


def test_preempted(engine: Engine) -> None:
    """While prompts are read, and while they are answered."""
    engine.kept.clear()
    for number, prompt in enumerate(PROMPTS):
        engine.add(prompt, NUM_TOKENS, str(number))
    num_steps, finished = 0, dict[str, Any]()
    while engine.llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        num_steps += 1
        if num_steps in (4, 30, 61) and engine.scheduler.running:
            engine.preempt(engine.scheduler.running[-1])
    engine.check_clean()
    check(engine, [answer_of(finished[str(number)]) for number in range(len(PROMPTS))])


def test_as_compressing_with_scales(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As checkpoints bring them along, one for the keys and one for the values of a layer."""
    for layer_idx, layer in engine.runner._layers().items():
        monkeypatch.setattr(layer, "_k_scale_float", 0.037 + layer_idx)
        monkeypatch.setattr(layer, "_v_scale_float", 0.11)
    make_cache_anew(engine)
    check(engine, engine.answers(PROMPTS, max_tokens=NUM_TOKENS))
    monkeypatch.undo()
    make_cache_anew(engine)


def make_cache_anew(engine: Engine) -> None:
    """With the layout looked for again, and nothing in it."""
    runner = engine.runner
    runner.kv_caches.clear()
    runner.attn_groups.clear()
    runner.initialize_kv_cache(runner.kv_cache_config)
    engine.note_positions()
    engine.scheduler.reset_prefix_cache()


def test_keeping_all_equals_plain_vllm(engine: Engine, plain: Engine) -> None:
    """In the same steps, and so to the bit."""
    expected = plain.answers(PROMPTS[1:], max_tokens=NUM_TOKENS)
    answers = engine.answers(PROMPTS[1:], max_tokens=NUM_TOKENS, budget="off")
    assert not engine.positions
    assert answers == expected
