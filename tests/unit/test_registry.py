"""Methods by name, with suggestions."""

from dataclasses import dataclass

import pytest

from compresskv.errors import ConfigError
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.methods.snapkv import SnapKV


@pytest.fixture
def own_methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Method]]:
    """A registry that a test may fill."""
    known = registry.methods()
    monkeypatch.setattr(registry, "_METHODS", known)
    return known


def test_the_methods_of_the_papers_are_known_and_sorted() -> None:
    names = list(registry.methods())
    assert names == sorted(names)
    assert {"compresskv", "full", "pyramidkv", "snapkv", "streaming_llm"} <= set(names)


def test_every_method_says_what_it_is_and_where_from() -> None:
    for name, method in registry.methods().items():
        assert method.name == name
        assert method.summary
        assert "\n" not in method.summary
        assert method.source


def test_create_passes_options() -> None:
    assert registry.create("snapkv", window_size=16, kernel_size=7) == SnapKV(window_size=16, kernel_size=7)
    assert registry.create("snapkv") == SnapKV()


@pytest.mark.parametrize(
    ("name", "suggested"), [("snapvk", "snapkv"), ("SnapKV", "snapkv"), ("compreskv", "compresskv")]
)
def test_a_near_name_is_suggested(name: str, suggested: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method='{name}' is unknown: did you mean '{suggested}'\?$"):
        registry.create(name)


@pytest.mark.parametrize("name", ["", "qqqqqqq"])
def test_a_far_name_gets_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^method='{name}' is unknown: choose from .*snapkv"):
        registry.create(name)


@pytest.mark.parametrize("name", [256, None, ["snapkv"], SnapKV])
def test_a_name_that_is_no_text_is_an_unknown_method(name: object) -> None:
    """`compressing(model, 256)`: the budget where the method belongs."""
    with pytest.raises(ConfigError, match=r"^method=.* is unknown") as caught:
        registry.create(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


def test_a_near_option_is_suggested() -> None:
    with pytest.raises(
        ConfigError, match=r"^windowsize=8 is no option of method 'snapkv': did you mean 'window_size'\?$"
    ):
        registry.create("snapkv", windowsize=8)


@pytest.mark.parametrize("option", ["budget", "name", "qqqqqqq"])
def test_a_far_option_gets_the_list(option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}=8 is no option of method 'snapkv': choose from .*window_size"):
        registry.create("snapkv", **{option: 8})


def test_an_option_out_of_range_is_refused_when_created() -> None:
    with pytest.raises(ConfigError, match=r"kernel_size=4"):
        registry.create("snapkv", kernel_size=4)


def test_a_new_method_is_found(own_methods: dict[str, type[Method]]) -> None:
    @registry.register
    @dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        summary = "a test's own"
        source = "-"

    assert registry.create("mine", window_size=3) == Mine(window_size=3)
    assert list(registry.methods()) == sorted(own_methods)


def test_a_name_is_registered_once(own_methods: dict[str, type[Method]]) -> None:
    class Another(SnapKV):
        pass

    with pytest.raises(ValueError, match="'snapkv' is registered already"):
        registry.register(Another)
    assert own_methods["snapkv"] is SnapKV
