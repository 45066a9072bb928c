"""A plan keeps what its method would have kept: in a second reading, out of a full cache, after a way through JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

import compresskv
import tiny
from compresskv import CacheStateError, CompressedCache, ConfigError, Plan, PlanError, make_plan, read_plan
from compresskv.attention import routing
from compresskv.compression import prepare_method
from compresskv.planning import PlanningCache
from oracle import evictions, oracle_logits

NUM_PROMPT, NUM_NEW = 70, 10
BUDGETS: list[Any] = [24, 0.4]


def planned(model: PreTrainedModel, method: str, budget: float = 24, **options: Any) -> Plan:
    ids = tiny.random_tokens(NUM_PROMPT)[0].tolist()
    return make_plan(model, ids, method, budget, **tiny.options_for(model, method), **options)


def full_cache(model: PreTrainedModel, sequence: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(sequence, past_key_values=cache, use_cache=True)
    return cache


def kept(cache: CompressedCache) -> list[Any]:
    return [None if layer.positions is None else tiny.kept_tokens(layer) for layer in cache.compressed_layers]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reading_again_by_the_plan_gives_the_methods_own_cache_and_answer(
    family: str, attn_implementation: str, method: str, budget: float
) -> None:
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        expected = tiny.generate(model, prompt, cache)
        wanted, nbytes = kept(cache), cache.nbytes
    plan = planned(model, method, budget)
    with compresskv.compressing(model, Plan.from_dict(json.loads(json.dumps(plan.to_dict())))) as cache:
        assert torch.equal(tiny.generate(model, prompt, cache), expected)
        assert kept(cache) == wanted
        assert cache.nbytes == nbytes


@pytest.mark.parametrize("num_later", [0, 3])
@pytest.mark.parametrize("method", ["vote", "blend", "snapkv", "full"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_full_cache_cut_by_the_plan_answers_as_if_cut_in_prefill(family: str, method: str, num_later: int) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT + 12)
    plan = planned(model, method)
    full = full_cache(model, sequence[:, :NUM_PROMPT])
    with torch.no_grad():  # tokens generated before the cut see the whole prompt
        for token in sequence[0, NUM_PROMPT : NUM_PROMPT + num_later]:
            model(token.view(1, 1), past_key_values=full, use_cache=True)
    shapes = [layer.keys.shape for layer in full.layers]
    with compresskv.compressing(model, plan) as expected:
        tiny.read(model, expected, sequence, [NUM_PROMPT])
    with compresskv.compressing(model, plan) as cache:
        cache.adopt(full, NUM_PROMPT)
        assert kept(cache) == kept(expected)
        assert cache.get_seq_length() == NUM_PROMPT + num_later
        logits = tiny.read(model, cache, sequence, [5, 1])
    assert [layer.keys.shape for layer in full.layers] == shapes
    num_read = NUM_PROMPT + num_later
    gone = {layer: functional.pad(blocked, (0, num_later)) for layer, blocked in evictions(expected).items()}
    wanted = oracle_logits(family, sequence[:, : num_read + 6], gone)[:, num_read:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["knorm", "streaming_llm"])
def test_methods_without_queries_cut_a_full_cache_too(method: str) -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, method, 24) as expected:
        tiny.read(model, expected, sequence, [NUM_PROMPT])
    with compresskv.compressing(model, method, 24) as cache:
        cache.adopt(full_cache(model, sequence))
    assert kept(cache) == kept(expected)


def test_one_list_for_all_layers_is_told_and_stored_once() -> None:
    model = tiny.tiny_model("llama")
    vote, snapkv = planned(model, "vote"), planned(model, "snapkv")
    assert vote.shared_positions is not None
    assert len(vote.shared_positions) == 24 == vote.mean_retained
    assert vote.to_dict()["positions"] == list(vote.shared_positions)
    assert snapkv.shared_positions is None
    assert len(snapkv.to_dict()["positions"]) == model.config.num_hidden_layers


def test_scores_tell_what_was_chosen_and_what_is_kept_anyway() -> None:
    model = tiny.tiny_model("llama")
    plan = planned(model, "vote", window_size=8, num_sinks=2)
    (layer, *_) = plan.layers
    by_position = dict(zip(layer.positions[0], layer.scores[0], strict=True))
    anyway = [0, 1, *range(NUM_PROMPT - 8, NUM_PROMPT)]
    assert [position for position, score in by_position.items() if score is None] == anyway
    chosen = [score for score in by_position.values() if score is not None]
    assert all(0 < score < 1.5 for score in chosen)
    more = planned(model, "vote", 40, window_size=8, num_sinks=2).layers[0]
    others = [
        score
        for position, score in zip(more.positions[0], more.scores[0], strict=True)
        if score is not None and position not in by_position
    ]
    assert max(others) <= min(chosen)


@pytest.mark.parametrize("method", ["blend", "vote", "cake", "snapkv", "adakv"])
def test_planning_holds_one_whole_layer_at_a_time(method: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    held = []
    options = tiny.options_for(model, method)
    chosen = prepare_method(model, method, options.pop("profile", None), **options)

    def note(done: int, layers: int) -> None:
        held.append(cache.nbytes)

    with routing(model):
        cache = PlanningCache(model, chosen, 24, on_layer=note)
        tiny.read(model, cache, prompt, [NUM_PROMPT])
    assert held == [0] * model.config.num_hidden_layers


def test_a_plan_of_another_prompt_or_model_is_refused() -> None:
    model, other = tiny.tiny_model("llama"), tiny.tiny_model("qwen2")
    plan = planned(model, "snapkv")
    with pytest.raises(PlanError, match=r"belongs to another model: it is for llama-.*, this is qwen2-"):
        compresskv.compressing(other, plan)
    with compresskv.compressing(model, plan) as cache, pytest.raises(PlanError, match="of 70 tokens, not 71"):
        tiny.read(model, cache, tiny.random_tokens(71), [71])
    plan.check_prompt(tiny.random_tokens(NUM_PROMPT)[0].tolist())
    with pytest.raises(PlanError, match="another prompt of the same length"):
        plan.check_prompt(tiny.random_tokens(NUM_PROMPT, seed=3)[0].tolist())
    with pytest.raises(PlanError, match="of 70 tokens, not 3"):
        plan.check_prompt([1, 2, 3])


def test_what_cannot_be_adopted_is_refused() -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    full = full_cache(model, sequence)
    with compresskv.compressing(model, "snapkv", 24) as cache, pytest.raises(ConfigError, match="needs queries"):
        cache.adopt(full)
    with compresskv.compressing(model, planned(model, "snapkv")) as cache:
        with pytest.raises(CacheStateError, match="cannot adopt 71 prompt tokens from a cache of 70"):
            cache.adopt(full, 71)
        with pytest.raises(PlanError, match="not 69"):
            cache.adopt(full, 69)
        cache.reset()
        cache.adopt(full)
        with pytest.raises(CacheStateError, match="into one of 70 tokens"):
            cache.adopt(full)


def test_a_plan_cannot_look_ahead() -> None:
    with pytest.raises(ConfigError, match="lookahead=3"):
        planned(tiny.tiny_model("llama"), "snapkv", lookahead=3)


def test_files(tmp_path: Path) -> None:
    plan = planned(tiny.tiny_model("llama"), "blend")
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match=r"nowhere.json.*No such file"):
        read_plan(tmp_path / "nowhere.json")
    with pytest.raises(PlanError, match="cannot write the plan to"):
        plan.write(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match=r"bad.json' is not JSON"):
        read_plan(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "x"}, "format is not 'compresskv-plan'"),
        ({"version": 9}, "version is 9"),
        ({"positions": [3, 2]}, "ascending"),
        ({"positions": [1, 70]}, "ascending tokens of a prompt of 70"),
        ({"positions": [-1, 2]}, "ascending"),
        ({"positions": [1]}, "one score for each"),
        ({"positions": []}, "keeps nothing"),
        ({"layers": []}, "no layers"),
        ({"layers": ["a"]}, "wrong kind"),
        ({"scores": ["a", 1]}, "wrong kind"),
        ({"prompt": {}}, "missing"),
    ],
)
def test_a_malformed_plan_is_refused(change: dict[str, Any], match: str) -> None:
    data = planned(tiny.tiny_model("llama"), "vote", 2).to_dict() | change
    with pytest.raises(PlanError, match=match):
        Plan.from_dict(data)
