"""A plan keeps what its method would have kept: in a second reading, out of a full cache, after a way through JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, StaticCache

import compresskv
import tiny
from compresskv import CacheStateError, CompressedCache, ConfigError, Plan, PlanError, PromptError, make_plan, read_plan
from compresskv.attention.routing import routing
from compresskv.cache.stores.retain import PACKED_STORES
from compresskv.methods.prepare import prepare_method
from compresskv.models.shape import compressible_layers
from compresskv.plans.make import PlanningCache
from compresskv.plans.plan import prompt_digest
from compresskv.selection.budgets import Budget
from oracle import evictions, oracle_logits

NUM_PROMPT, NUM_NEW = 70, 10
BUDGETS: list[Any] = [24, 0.4, [20, 40, 24, 28, 80, 22]]


def planned(model: PreTrainedModel, method: str, budget: Budget = 24, **options: Any) -> Plan:
    if not isinstance(budget, (int, float)):
        budget = budget[: len(compressible_layers(model))]
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
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT)
    if not isinstance(budget, (int, float)):
        budget = budget[: len(compressible_layers(model))]
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        expected = tiny.generate(model, prompt, cache)
        wanted, nbytes = kept(cache), cache.nbytes
    plan = planned(model, method, budget)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    with compresskv.compressing(model, again, [5] * len(plan.layers)) as cache:  # a plan brings its own budget
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
        assert num_later or cache.nbytes == expected.nbytes
        logits = tiny.read(model, cache, sequence, [5, 1])
    assert [layer.keys.shape for layer in full.layers] == shapes
    num_read = NUM_PROMPT + num_later
    gone = {layer: functional.pad(blocked, (0, num_later)) for layer, blocked in evictions(expected).items()}
    wanted = oracle_logits(family, sequence[:, : num_read + 6], gone)[:, num_read:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.stores(reason="what is packed has stores of its own")
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["blend", "snapkv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_full_cache_gives_is_packed_as_in_prefill(family: str, method: str, store: str) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT + 6)
    plan = planned(model, method)
    with compresskv.compressing(model, plan, store=store) as expected:
        wanted = tiny.read(model, expected, sequence, [NUM_PROMPT, 5, 1])[:, NUM_PROMPT:]
    with compresskv.compressing(model, plan, store=store) as cache:
        cache.adopt(full_cache(model, sequence[:, :NUM_PROMPT]), NUM_PROMPT)
        kinds = {type(layer.store) for layer in cache.compressed_layers}
        logits = tiny.read(model, cache, sequence, [5, 1])
    assert kinds == {PACKED_STORES[store]}
    assert kept(cache) == kept(expected)
    assert cache.nbytes == expected.nbytes
    assert float((logits - wanted).abs().mean()) < 2e-4  # a number between two codes may get either


@pytest.mark.parametrize("method", ["knorm", "streaming_llm"])
def test_methods_without_queries_cut_a_full_cache_too(method: str) -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, method, 24) as expected:
        tiny.read(model, expected, sequence, [NUM_PROMPT])
    with compresskv.compressing(model, method, 24) as cache:
        cache.adopt(full_cache(model, sequence))
    assert kept(cache) == kept(expected)


def test_a_static_cache_can_be_adopted_its_empty_slots_cannot() -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + 3)
    plan, static = planned(model, "blend"), StaticCache(config=model.config, max_cache_len=100)
    with torch.no_grad():
        model(sequence[:, :NUM_PROMPT], past_key_values=static, use_cache=True)
    with compresskv.compressing(model, plan) as expected:
        wanted = tiny.read(model, expected, sequence, [NUM_PROMPT, 1, 2])[:, NUM_PROMPT:]
    with compresskv.compressing(model, plan) as cache:
        cache.adopt(static)
        torch.testing.assert_close(tiny.read(model, cache, sequence, [1, 2]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "vote"])
def test_a_plan_fits_its_prompt_wherever_padding_puts_it(method: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    plan = planned(model, method)
    with compresskv.compressing(model, plan) as expected:
        tiny.read(model, expected, prompt, [NUM_PROMPT])
    padded, mask = tiny.left_padded([prompt, prompt, tiny.random_tokens(NUM_PROMPT + 4)])
    with compresskv.compressing(model, plan) as cache:
        tiny.read(model, cache, padded[:2], [NUM_PROMPT + 4], mask[:2])
    for layer, wanted in zip(cache.compressed_layers, expected.compressed_layers, strict=True):
        shifted = [[token + 4 for token in head] for head in tiny.kept_tokens(wanted)[0]]
        assert tiny.kept_tokens(layer) == [shifted, shifted]


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


@pytest.mark.parametrize("method", ["vote", "blend"])
def test_a_window_that_is_narrow_for_a_small_budget_is_told_as_it_was(method: str) -> None:
    model = tiny.tiny_model("llama")
    for layer in planned(model, method, 24, window_size=32, num_sinks=0).layers:
        for positions, scores in zip(layer.positions, layer.scores, strict=True):
            anyway = [position for position, score in zip(positions, scores, strict=True) if score is None]
            assert anyway == list(range(NUM_PROMPT - 12, NUM_PROMPT))  # half of the budget


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


def test_what_cannot_be_adopted_is_refused_and_changes_nothing() -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    full, plan = full_cache(model, sequence), planned(model, "snapkv")
    for method in ("snapkv", "expected_attention"):
        with compresskv.compressing(model, method, 24) as cache, pytest.raises(ConfigError, match="needs queries"):
            cache.adopt(full)
    with compresskv.compressing(model, plan) as cut:
        tiny.read(model, cut, sequence, [NUM_PROMPT])
    with compresskv.compressing(model, plan) as cache:
        with pytest.raises(CacheStateError, match="cannot adopt 71 prompt tokens from a DynamicCache of 70"):
            cache.adopt(full, 71)
        with pytest.raises(CacheStateError, match="from a CompressedCache of 70"):
            cache.adopt(cut)
        with pytest.raises(CacheStateError, match="from a DynamicCache of 70"):
            cache.adopt(full_cache(model, tiny.random_tokens(NUM_PROMPT, batch_size=2)))
        with pytest.raises(CacheStateError, match="from a DynamicCache of 0"):
            cache.adopt(DynamicCache(config=model.config))
        with pytest.raises(PlanError, match="not 69"):
            cache.adopt(full, 69)
        cache.adopt(full)
        with pytest.raises(CacheStateError, match="into a cache of 70"):
            cache.adopt(full)


def test_a_prompts_digest_does_not_depend_on_how_its_ids_are_given() -> None:
    ids = tiny.random_tokens(NUM_PROMPT)[0]
    assert len({prompt_digest(one) for one in (ids, ids.numpy(), ids.tolist(), tuple(ids.tolist()))}) == 1


def test_token_ids_that_are_no_prompt_are_refused() -> None:
    model = tiny.tiny_model("llama")
    for wrong in ([], tiny.random_tokens(5).tolist(), tiny.random_tokens(5)):
        with pytest.raises(PromptError, match="integers of one prompt"):
            make_plan(model, wrong, "snapkv")


def test_options_and_other_layers_or_heads_are_refused() -> None:
    model = tiny.tiny_model("llama")
    plan = planned(model, "adakv")
    with pytest.raises(ConfigError, match="beside a plan, which takes none"):
        compresskv.compressing(model, plan, window_size=3)
    with pytest.raises(PlanError, match="other layers"):
        compresskv.compressing(model, replace(plan, layers=plan.layers[:-1]))
    first = plan.layers[0]
    more = replace(first, positions=first.positions[:1] * 3, scores=first.scores[:1] * 3)
    with pytest.raises(PlanError, match=f"3 lists for the 2 KV heads of layer {first.layer_idx}"):
        compresskv.compressing(model, replace(plan, layers=(more, *plan.layers[1:])))


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


def test_a_plan_of_an_earlier_release_is_read() -> None:
    shared = {
        "format": "compresskv-plan", "version": 1, "model": "llama-2x4x2x8x40-00",
        "prompt": {"num_tokens": 9, "sha256": "ab"},
        "method": "vote", "budget": [3, 3], "profile": None, "versions": {"torch": "2.13.0"}, "layers": [0, 2],
        "positions": [0, 7, 8], "scores": [1, 0.5, None],
    }  # fmt: skip
    plan = Plan.from_dict(shared)
    assert plan.budget == (3, 3)
    assert [layer.layer_idx for layer in plan.layers] == [0, 2]
    assert all((one.positions, one.scores) == (((0, 7, 8),), ((1.0, 0.5, None),)) for one in plan.layers)
    own = shared | {"positions": [[[0, 7]], [[1, 7], [2, 8]]], "scores": [[[1, None]], [[1, None], [2.5, None]]]}
    assert Plan.from_dict(own).layers[1].positions == ((1, 7), (2, 8))
    for data in (shared, own):
        assert Plan.from_dict(data).to_dict() == data


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "x"}, "format is not 'compresskv-plan'"),
        ({"version": 9}, "version is 9"),
        ({"positions": [3, 2]}, "ascending"),
        ({"positions": [1, 70]}, "ascending tokens of a prompt of 70"),
        ({"positions": [-1, 2]}, "ascending"),
        ({"positions": [1]}, "one score for each"),
        ({"positions": []}, "not positions and scores for each layer"),
        ({"positions": [[[]], [[1, 2]]], "scores": [[[]], [[1, 2]]], "layers": [0, 1]}, "layer 0 keeps nothing"),
        ({"layers": []}, "no layers"),
        ({"layers": ["a"]}, r"^field 'layers\[0\]' is text, not a whole number$"),
        ({"scores": ["a", 1]}, "is text, not a number or null$"),
        ({"prompt": {}}, r"^field 'prompt.num_tokens' is missing$"),
        ({"layers": [0, 0, 1, 2]}, "layers are not ascending"),
        ({"layers": [2, 1]}, "layers are not ascending"),
        ({"positions": [1.0, 2.0]}, "is a number, not a whole number"),
        ({"positions": [True, 2]}, "is true or false, not a whole number"),
        ({"positions": [[1, 2], [3, 4]]}, "not positions and scores for each layer"),
        ({"scores": [10**400, 1]}, "out of range"),
        ({"scores": [float("nan"), 1]}, "not finite"),
        ({"scores": ["inf", 1]}, "is text, not a number or null$"),
        ({"budget": "x"}, "^budget='x' "),
        ({"budget": -3}, "^budget=-3 "),
        ({"profile": 3}, "^field 'profile' is a whole number, not text or null$"),
        ({"version": True}, "version is True"),
        ({"prompt": {"num_tokens": 70, "sha256": None}}, r"^field 'prompt.sha256' is null, not text$"),
    ],
)
def test_a_malformed_plan_is_refused(change: dict[str, Any], match: str) -> None:
    data = planned(tiny.tiny_model("llama"), "vote", 2).to_dict() | change
    with pytest.raises(PlanError, match=match):
        Plan.from_dict(data)
