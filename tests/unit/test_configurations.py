"""Methods and budgets as people type them, and the rows of a table that they become."""

import re
from typing import Any

import pytest

import tiny
from compresskv.errors import ConfigError, ProfileError
from compresskv.evaluation.configurations import configurations, parse_budgets, parse_names
from compresskv.evaluation.records import SETTINGS
from compresskv.methods import registry
from compresskv.methods.registry import parse_methods

METHODS = [name for name in registry.methods() if name != "vote"]


class TestMethods:
    def test_every_method_goes_by_its_name(self) -> None:
        methods = parse_methods("methods", ",".join(METHODS))
        assert list(methods) == METHODS
        assert [method.name for method in methods.values()] == METHODS
        assert all(method == registry.create(name) for name, method in methods.items())

    @pytest.mark.parametrize(
        "text",
        [
            "snapkv,snapkv[window_size=32,kernel_size=15],knorm",
            " snapkv , snapkv [ window_size=32 , kernel_size=15 ] ,knorm ",
            "snapkv,snapkv[window-size=32,kernel-size=15],knorm",
            "snapkv,snapkv[kernel_size=15,window_size=32,],knorm",
            "snapkv[],snapkv[window_size=32,kernel_size=15],snapkv,knorm,knorm[]",
            "snapkv[window_size=8],snapkv[window_size=32,kernel_size=15],knorm",  # its default
        ],
    )
    def test_commas_in_brackets_belong_to_the_method(self, text: str) -> None:
        methods = parse_methods("methods", text)
        assert list(methods) == ["snapkv", "snapkv[window_size=32,kernel_size=15]", "knorm"]
        assert [getattr(method, "window_size", None) for method in methods.values()] == [8, 32, 0]

    @pytest.mark.parametrize("text", ["snapkv,adakv[window_size=16,kernel_size=7],knorm", "full,streaming_llm"])
    def test_a_label_is_what_would_make_the_same_method_again(self, text: str) -> None:
        methods = parse_methods("methods", text)
        assert parse_methods("methods", ",".join(methods)) == methods
        assert [method.label for method in methods.values()] == list(methods)

    def test_options_that_are_no_whole_numbers(self) -> None:
        (name,) = parse_methods("methods", "pyramidkv[beta=10.5]")
        assert name == "pyramidkv[beta=10.5]"

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("snapkv[window_size=32", "'snapkv[window_size=32' is not NAME or NAME[option=value,...]"),
            ("snapkv window_size=32]", "is not NAME or NAME[option=value,...]"),
            ("snapkv]", "'snapkv]' is not NAME"),
            ("snapkv[[window_size=32]]", "is not NAME"),
            ("snapkv[window_size=32]x", "is not NAME"),
            ("snapkv[window_size=8][kernel_size=5]", "is not NAME"),
            ("snapkv[window_size=32,knorm", "is not NAME"),
            ("[window_size=32]", "is not NAME"),
            ("", "methods='' is not NAME"),
            ("snapkv,,knorm", "methods='' is not NAME"),
            ("snapvk", "methods='snapvk' is unknown: did you mean 'snapkv'?"),
            ("full,banana", "methods='banana' is unknown: choose from "),
            ("SNAPKV", "did you mean 'snapkv'?"),
            ("snapkv[windowsize=8]", "windowsize=8 is no option of method 'snapkv': did you mean 'window_size'?"),
            ("full[kernel_size=8]", "kernel_size=8 is no option of method 'full'"),
            ("snapkv[window_size]", "methods='snapkv[window_size]': 'window_size' is not NAME=VALUE"),
            ("snapkv[window_size=]", "is not NAME=VALUE"),
            ("snapkv[=3]", "is not NAME=VALUE"),
            ("snapkv[window_size=x]", "'x' is not a number"),
            ("snapkv[window_size=0]", "window_size=0"),
            ("snapkv[window_size=1.5]", "window_size=1.5"),
            ("compresskv[profile=3]", "profile=3 is no option of method 'compresskv'"),
        ],
    )
    def test_what_is_wrong_is_told_in_one_line(self, text: str, told: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(told)) as caught:
            parse_methods("methods", text)
        assert "\n" not in str(caught.value)

    def test_a_profile_does_not_show_in_a_label(self) -> None:
        model: Any = tiny.tiny_model("llama")
        method = registry.create("compresskv").with_profile(tiny.random_profile(model))
        assert method.label == "compresskv"


def test_every_store_and_the_full_cache_in_those_of_fewer_bits() -> None:
    model, methods = tiny.tiny_model("llama"), parse_methods("methods", "full,snapkv")
    chosen = configurations(model, methods, [24, "20kB"], stores=("native", "int4"))
    assert [one.name for one in chosen] == [
        "full",
        "full int4 @ 100%",
        "snapkv @ 24",
        "snapkv int4 @ 24",
        "snapkv @ 20kB",
        "snapkv int4 @ 20kB",
    ]


class TestBudgets:
    @pytest.mark.parametrize(
        ("text", "budgets"),
        [
            ("64,128,256", (64, 128, 256)),
            (" 64 , 3% ,0.5,", (64, 0.03, 0.5)),
            ("128,64,128", (128, 64)),
            ("3%,0.03", (0.03,)),
            ("1,100%,1.0", (1, 1.0)),
            ("1.0,1", (1.0, 1)),
        ],
    )
    def test_each_once_in_order(self, text: str, budgets: tuple[float, ...]) -> None:
        """One token and the whole prompt are equal as numbers only."""
        assert [repr(budget) for budget in parse_budgets(text)] == [repr(budget) for budget in budgets]

    @pytest.mark.parametrize("text", ["", " , ", "0", "-64", "64,abc", "1.5", "0%", "101%", "nan", "64;128"])
    def test_what_is_none_is_refused_in_one_line(self, text: str) -> None:
        with pytest.raises(ConfigError, match="budget") as caught:
            parse_budgets(text)
        assert "\n" not in str(caught.value)


class TestNames:
    def test_each_once_in_order(self) -> None:
        assert parse_names("settings", " agnostic, aware,agnostic,", SETTINGS) == ("agnostic", "aware")

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("awear", "settings='awear' is unknown: did you mean 'aware'?"),
            ("both", "settings='both' is unknown: choose from aware, agnostic"),
            ("", "settings='' names nothing: choose from aware, agnostic"),
            (" , ", "names nothing"),
        ],
    )
    def test_unknown_ones_get_a_suggestion(self, text: str, told: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(told)):
            parse_names("settings", text, SETTINGS)


class TestConfigurations:
    def names(self, methods: str, budgets: str, settings: tuple[str, ...] = ("aware",)) -> list[str]:
        model = tiny.tiny_model("llama")
        found = configurations(
            model, parse_methods("methods", methods), parse_budgets(budgets), settings, tiny.random_profile(model)
        )
        return [configuration.name for configuration in found]

    def test_the_full_cache_comes_first_and_once_whether_it_was_named_or_not(self) -> None:
        expected = ["full", "snapkv @ 64", "snapkv @ 3%"]
        assert self.names("snapkv", "64,3%") == expected
        assert self.names("snapkv,full", "64,3%") == expected
        assert self.names("full", "64,3%") == ["full"]

    def test_every_method_at_every_budget_in_every_setting(self) -> None:
        assert self.names("full,snapkv,snapkv[window_size=32]", "64,128", ("aware", "agnostic")) == [
            "full",
            "snapkv @ 64",
            "snapkv[window_size=32] @ 64",
            "snapkv @ 128",
            "snapkv[window_size=32] @ 128",
            "snapkv @ 64 (agnostic)",
            "snapkv[window_size=32] @ 64 (agnostic)",
            "snapkv @ 128 (agnostic)",
            "snapkv[window_size=32] @ 128 (agnostic)",
        ]

    def test_methods_that_need_a_profile_get_the_models(self) -> None:
        model = tiny.tiny_model("llama")
        profile = tiny.random_profile(model)
        _, ours, other = configurations(model, parse_methods("methods", "compresskv,snapkv"), [64], profile=profile)
        assert ours.method == registry.create("compresskv").with_profile(profile)
        assert other.method == registry.create("snapkv")
        assert ours.name == "compresskv @ 64"

    def test_a_model_without_a_profile_is_told_before_anything_is_read(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
        model = tiny.tiny_model("llama")
        assert len(configurations(model, parse_methods("methods", "snapkv"), [64])) == 2
        with pytest.raises(ProfileError, match="no profile"):
            configurations(model, parse_methods("methods", "snapkv,compresskv"), [64])
