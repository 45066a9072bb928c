"""Budgets that each prompt decides: their text, the ladder, the choice, and what holds of it in a cache."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from compresskv import ask, compressing, make_plan
from compresskv import read as read_document
from compresskv.cache.auto import choose_budgets
from compresskv.cache.cache import CompressedCache
from compresskv.compression import Compressing
from compresskv.errors import ConfigError
from compresskv.evaluation.configurations import configurations, parse_budgets
from compresskv.methods.registry import create, methods, parse_methods
from compresskv.plans.plan import Plan
from compresskv.profiles.profile import Profile
from compresskv.selection.auto_budget import (
    LEAST_TOKENS,
    MAX_LOSS,
    AutoBudget,
    AutoChoice,
    LossCurve,
    find_auto_budget,
    rungs,
    with_limits,
)
from compresskv.selection.budgets import budget_order, in_tokens, is_share, known_beforehand, read_budget
from compresskv.serving.settings import Settings, requested_budget

ABLE = [name for name, kind in methods().items() if kind.general_loss is not None]
LENGTH = 400


class TestText:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("auto", AutoBudget()),
            (" auto ", AutoBudget()),
            ("auto[max_loss=0.05]", AutoBudget(0.05)),
            ("auto [ at_most = 25%, max_loss=1e-3 ]", AutoBudget(1e-3, "25%")),
            ("auto[at_most=5% of bytes]", AutoBudget(MAX_LOSS, "5% of bytes")),
        ],
    )
    def test_it_is_read_and_written_alike(self, text: str, expected: AutoBudget) -> None:
        assert find_auto_budget(text) == expected
        assert read_budget(text) == expected.text
        assert read_budget(expected.text) == expected.text

    @pytest.mark.parametrize("text", ["autos", "auto 5", "5%", "3MB", "", "[auto]"])
    def test_other_budgets_are_none(self, text: str) -> None:
        assert find_auto_budget(text) is None

    @pytest.mark.parametrize(
        "text",
        [
            "auto[max_loss=0]",
            "auto[max_loss=-1]",
            "auto[max_loss=nan]",
            "auto[max_loss=inf]",
            "auto[max_loss=much]",
            "auto[max_loss=]",
            "auto[loss=1]",
            "auto[max_loss=1,max_loss=2]",
            "auto[at_most=0]",
            "auto[at_most=110%]",
            "auto[at_most=many]",
            "auto[at_most=auto]",
        ],
    )
    def test_what_cannot_be_is_refused_by_its_own_text(self, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_budget(text)
        assert str(caught.value).startswith(f"budget={text!r} ")
        assert "\n" not in str(caught.value)

    def test_budgets_are_split_between_brackets(self) -> None:
        parsed = parse_budgets("64,auto[max_loss=0.1,at_most=512],auto,3MB")
        assert parsed == (64, "auto[max_loss=0.1,at_most=512]", "auto[max_loss=0.1]", "3MB")
        assert sorted(parsed, key=budget_order)[0] == 64

    def test_limits_are_put_beside_it_alone(self) -> None:
        assert with_limits("auto", None, None) == "auto"
        assert with_limits("auto", 0.05, "25%") == "auto[max_loss=0.05,at_most=25%]"
        for limits in ((0.05, None), (None, "25%")):
            with pytest.raises(ConfigError, match="is for budget='auto', not for '128'"):
                with_limits("128", *limits)

    def test_it_is_refused_where_no_prompt_decides(self) -> None:
        assert known_beforehand("5% of bytes") == "5% of bytes"
        assert not is_share("auto")
        for refuse in (known_beforehand, in_tokens, Settings, lambda text: requested_budget({"compresskv": text}, 1)):
            with pytest.raises(ConfigError, match=r"auto.* depends on each prompt"):
                refuse("auto")


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000), st.integers(1, 100_000))
def test_rungs_are_close_and_end_at_the_most(least: int, most: int) -> None:
    ladder = rungs(least, most)
    assert ladder == sorted(set(ladder))
    assert (ladder[0], ladder[-1]) == (min(least, most), most)
    assert all(b <= max(a + 1, 1.2 * a + 1) for a, b in itertools.pairwise(ladder))


class TestChoice:
    """One row or several, of a share of attention that falls with what is kept."""

    curve = LossCurve(scale=2.0, power=2.0)

    def choose(self, max_loss: float, most: list[int], lengths: list[int]) -> tuple[list[AutoChoice], int]:
        calls: list[list[int]] = []

        def shares(counts: list[int]) -> list[float]:
            calls.append(counts)
            return [1 - count / length for count, length in zip(counts, lengths, strict=True)]

        return choose_budgets(shares, self.curve, max_loss, 16, most, lengths), len(calls)

    def test_it_is_the_first_rung_that_loses_little_enough(self) -> None:
        for max_loss in (1e-6, 0.01, 0.1, 0.5, 1.0, 1.9, 3.0):
            (choice,), calls = self.choose(max_loss, [1000], [1000])
            ladder = rungs(16, 1000)
            losses = {count: self.curve.loss(1 - count / 1000) for count in ladder}
            expected = next(count for count in ladder if losses[count] <= max_loss)
            assert (choice.tokens, choice.predicted_loss) == (expected, losses[expected])
            assert choice.why == ("least" if expected == 16 else "all" if expected == 1000 else "loss")
            assert calls <= math.ceil(math.log2(len(ladder))) + 1

    def test_the_ceiling_holds_and_tells_what_it_costs(self) -> None:
        (choice,), _ = self.choose(0.01, [300], [1000])
        assert (choice.tokens, choice.why) == (300, "at_most")
        assert choice.predicted_loss == pytest.approx(2 * 0.7**2)
        assert choice.max_loss == 0.01

    @settings(deadline=None, max_examples=50)
    @given(st.floats(1e-4, 3), st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=4))
    def test_rows_do_not_change_one_another(self, max_loss: float, sizes: list[tuple[int, int]]) -> None:
        rows = [(min(pair), max(pair)) for pair in sizes]
        together, _ = self.choose(max_loss, [most for most, _ in rows], [length for _, length in rows])
        alone = [self.choose(max_loss, [most], [length])[0][0] for most, length in rows]
        assert together == alone


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.tiny_model("llama")


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel) -> Profile:
    return tiny.random_profile(model)


def prompt(length: int = LENGTH, seed: int = 0) -> Tensor:
    return tiny.random_tokens(length, seed=seed)


def read(
    model: PreTrainedModel,
    profile: Profile,
    budget: str | float,
    ids: Tensor | None = None,
    name: str = "blend",
    mask: Tensor | None = None,
) -> CompressedCache:
    with compressing(model, name, budget, profile=profile) as cache:
        ids = prompt() if ids is None else ids
        tiny.read(model, cache, ids, [ids.shape[1]], mask)
    return cache


def kept(cache: CompressedCache) -> list[list[list[list[int]]]]:
    return [tiny.kept_tokens(layer) for layer in cache.compressed_layers]


@pytest.mark.parametrize("name", ABLE)
class TestInACache:
    def test_it_keeps_what_the_chosen_number_would(self, model: PreTrainedModel, profile: Profile, name: str) -> None:
        cache = read(model, profile, f"auto[max_loss={self.some_loss(model, profile, name)}]", name=name)
        (choice,) = cache.auto_choices
        assert LEAST_TOKENS < choice.tokens < LENGTH
        assert choice.why == "loss"
        plain = read(model, profile, choice.tokens, name=name)
        assert kept(cache) == kept(plain)
        assert plain.auto_choices == []

    def test_a_smaller_loss_keeps_more_until_all_is_kept(
        self, model: PreTrainedModel, profile: Profile, name: str
    ) -> None:
        counts = [
            read(model, profile, f"auto[max_loss={loss:.9g}]", name=name).auto_choices[0].tokens
            for loss in (1e3, self.some_loss(model, profile, name), 1e-12)
        ]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (LEAST_TOKENS, LENGTH)

    def test_rows_of_a_padded_batch_decide_for_themselves(
        self, model: PreTrainedModel, profile: Profile, name: str
    ) -> None:
        budget = f"auto[max_loss={self.some_loss(model, profile, name)}]"
        short = prompt(300, seed=1)
        batch, mask = tiny.left_padded([prompt(), short])
        both = read(model, profile, budget, batch, name, mask).auto_choices
        alone = [read(model, profile, budget, ids, name).auto_choices[0] for ids in (prompt(), short)]
        for together, one in zip(both, alone, strict=True):
            assert (together.tokens, together.why) == (one.tokens, one.why)
            assert together.predicted_loss == pytest.approx(one.predicted_loss, rel=1e-3)

    def some_loss(self, model: PreTrainedModel, profile: Profile, name: str) -> float:
        """What is predicted at some 200 tokens."""
        cache = read(model, profile, "auto[max_loss=1e-9,at_most=200]", name=name)
        return cache.auto_choices[0].predicted_loss


class TestVerbs:
    @pytest.mark.parametrize("ceiling", ["150", "50%", "100kB"])
    def test_a_ceiling_of_any_kind(self, model: PreTrainedModel, profile: Profile, ceiling: str) -> None:
        cache = read(model, profile, f"auto[max_loss=1e-9,at_most={ceiling}]")
        (choice,) = cache.auto_choices
        assert choice.why == "at_most"
        assert kept(cache) == kept(read(model, profile, ceiling))

    def test_a_short_prompt_is_kept_whole(self, model: PreTrainedModel, profile: Profile) -> None:
        cache = read(model, profile, "auto", prompt(LEAST_TOKENS))
        assert [(one.tokens, one.why, one.predicted_loss) for one in cache.auto_choices] == [(LEAST_TOKENS, "all", 0)]
        assert kept(cache) == kept(read(model, profile, 1.0, prompt(LEAST_TOKENS)))

    def test_what_the_curve_says_is_what_counts(
        self, model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loss = read(model, profile, "auto[max_loss=1e-9,at_most=200]").auto_choices[0].predicted_loss
        budget = f"auto[max_loss={loss}]"
        low = read(model, profile, budget).auto_choices[0]
        kind = methods()["blend"]
        general = kind.general_loss
        assert general is not None
        own = replace(profile, loss_curves={"blend": (4 * general.scale, general.power)})
        high = read(model, own, budget).auto_choices[0]
        assert high.tokens > low.tokens
        assert high.predicted_loss == pytest.approx(4 * general.loss(high.uncovered))
        monkeypatch.setattr(kind, "general_loss", replace(general, scale=4 * general.scale))
        assert read(model, profile, budget).auto_choices[0] == high

    @pytest.mark.parametrize("store", ["int8", "int4"])
    def test_stores_of_fewer_bits(self, model: PreTrainedModel, profile: Profile, store: str) -> None:
        with compressing(model, "blend", "auto[at_most=200]", profile=profile, store=store) as cache:
            tiny.read(model, cache, prompt(), [LENGTH])
        layers = cache.compressed_layers
        assert sum(layer.mean_retained for layer in layers) <= 200 * len(layers)
        assert len(cache.auto_choices) == 1

    def test_plans_hold_the_choice_and_two_passes_keep_it(self, model: PreTrainedModel, profile: Profile) -> None:
        budget = "auto[max_loss=0.001,at_most=60%]"
        plan = make_plan(model, prompt()[0].tolist(), "blend", budget, profile=profile)
        cache = read(model, profile, budget)
        assert plan.auto == cache.auto_choices[0]
        assert Plan.from_dict(plan.to_dict()) == plan
        with compressing(model, plan, budget) as planned:
            tiny.read(model, planned, prompt(), [LENGTH])
        assert kept(planned) == kept(cache)

    @pytest.mark.parametrize("two_pass", [False, True])
    def test_an_answer_says_what_was_chosen(self, model: PreTrainedModel, profile: Profile, two_pass: bool) -> None:
        tokenizer = tiny.tokenizer()
        given = {"profile": profile, "two_pass": two_pass, "max_new_tokens": 2}
        answer = ask(model, tokenizer, tiny.random_words(250), "5 6", budget="auto[at_most=130,max_loss=1e-9]", **given)
        assert answer.stats.budget == "auto[max_loss=1e-09,at_most=130]"
        assert answer.stats.auto is not None
        assert (answer.stats.auto.tokens, answer.stats.auto.why) == (130, "at_most")
        assert answer.to_dict()["stats"]["auto"] == answer.stats.auto.to_dict()
        kept_per_layer = answer.stats.retained_per_layer
        assert sum(kept_per_layer) == pytest.approx(130 * len(kept_per_layer), abs=1)

    @pytest.mark.parametrize("name", sorted(set(methods()) - set(ABLE)))
    def test_methods_that_cannot_tell_are_refused_by_name(self, model: PreTrainedModel, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"^budget='auto' needs a method .* use {ABLE[0]!r}.*, not '{name}'$"):
            Compressing(model, create(name), "auto")

    def test_what_does_not_see_the_whole_prompt_at_its_end_is_refused(
        self, model: PreTrainedModel, profile: Profile
    ) -> None:
        with pytest.raises(ConfigError, match=r"^budget='auto.*' cannot look ahead: leave out lookahead=3$"):
            compressing(model, "blend", "auto", profile=profile, lookahead=3)
        with pytest.raises(ConfigError, match=r"^budget='auto.*' depends on each prompt"):
            read_document(model, tiny.tokenizer(), "a b c", budget="auto")
        chosen = parse_methods("methods", "blend")
        with pytest.raises(ConfigError, match=r"^budgets='auto.*' depends on each prompt"):
            configurations(model, chosen, parse_budgets("auto"), ("aware", "agnostic"), profile)
        with pytest.raises(ConfigError, match="not 'snapkv'"):
            configurations(model, parse_methods("methods", "snapkv"), parse_budgets("auto"))
