"""Methods by name, with suggestions."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tiny
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


def test_what_lists_and_tables_need_must_be_there(own_methods: dict[str, type[Method]]) -> None:
    class Bare(Method):
        name = "bare"

    with pytest.raises(ConfigError, match=r"^method='bare' has no summary and no source$"):
        registry.register(Bare)
    assert "bare" not in own_methods


def test_options_without_a_dataclass_are_told(own_methods: dict[str, type[Method]]) -> None:
    class Typed(SnapKV):
        name = "typed"
        keep: int = 3

    with pytest.raises(ConfigError, match=r"^method='typed' has options, so it must be a dataclass: @register above"):
        registry.register(Typed)

    class Plain(SnapKV):
        name: ClassVar[str] = "plain"
        needs_profile: "ClassVar[bool]" = False

    assert registry.register(Plain) is own_methods["plain"]
    assert registry.create("plain", window_size=3).label == "plain[window_size=3]"


def test_the_example_of_the_page_on_methods_works(own_methods: dict[str, type[Method]]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n((?:(?!```).)*@compresskv\.register.*?)```", page, flags=re.DOTALL)
    model = tiny.tiny_model("llama")
    ids = torch.arange(5, 45)[None]
    read = "with torch.no_grad():\n        model(ids, past_key_values=cache)"
    found = {"model": model, "ids": ids, "torch": torch}
    exec(example.replace("budget=256", "budget=16").replace("    ...\n", f"    {read}\n"), found)
    cache: Any = found["cache"]
    assert {count for layer in cache.compressed_layers for count in layer.store.counts} == {16}


def test_a_name_is_registered_once(own_methods: dict[str, type[Method]]) -> None:
    class Another(SnapKV):
        pass

    with pytest.raises(ValueError, match="'snapkv' is registered already"):
        registry.register(Another)
    assert own_methods["snapkv"] is SnapKV


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [("num_things", True, "must be an int"), ("factor", float("nan"), "finite"), ("is_odd", 1, "true or false")],
)
@pytest.mark.parametrize("future", [True, False], ids=["types as text", "types"])
def test_options_are_checked_however_a_method_file_writes_its_types(
    own_methods: dict[str, type[Method]], option: str, value: object, problem: str, *, future: bool
) -> None:
    source = """
from dataclasses import dataclass
from typing import TYPE_CHECKING
from compresskv import Method
Count = int
if TYPE_CHECKING or not FUTURE:
    Shape = tuple
@dataclass(frozen=True)
class Other(Method):
    name = "other"
    summary = source = "a test's own"
    num_things: Count = 1
    factor: float = 1.0
    is_odd: bool = False
    shape: "Shape | None" = None
""".replace("FUTURE", str(future))
    module = type(sys)("a_method_file")
    sys.modules[module.__name__] = module
    exec(("from __future__ import annotations\n" if future else "") + source, vars(module))
    registry.register(module.Other)
    assert registry.create("other", num_things=3, shape=(1, 2)).label == "other[num_things=3]"
    with pytest.raises(ConfigError, match=rf"^{option}=.* {problem}"):
        registry.create("other", **{option: value})
    del sys.modules[module.__name__]


def test_what_is_no_number_is_no_option_to_type() -> None:
    with pytest.raises(ConfigError, match=r"^profile=3 is no option of method 'blend': choose from window_size"):
        registry.create("blend", profile=3)


METHOD_FILE = """
from dataclasses import dataclass
import torch
from compresskv import Method

@dataclass(frozen=True)
class Every(Method):
    name = "every"
    summary = "every n-th token"
    source = "-"
    step: int = 2

    def score(self, inputs):
        positions = torch.arange(inputs.keys.shape[2])
        return (positions % self.step == 0).float().expand(len(inputs.keys), 1, -1)
"""


def test_methods_of_other_packages_are_found_by_their_entry_points(tmp_path: Path) -> None:
    (tmp_path / "every_nth.py").write_text(METHOD_FILE, encoding="utf-8")
    info = tmp_path / "every_nth-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: every-nth\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[compresskv.methods]\nevery = every_nth:Every\nbroken = no_such_module\n", encoding="utf-8"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from compresskv.methods import registry
print(registry.create("every", step=3).label, *registry.parse_methods("methods", "every[step=4],full"))
print("every" in registry.methods())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "every[step=3] every[step=4] full\nTrue\n"
    assert done.stderr.count("cannot be loaded") == 1
    assert "'broken' (no_such_module)" in done.stderr


def test_nothing_heavy_is_imported_to_name_methods() -> None:
    """What methods import at their files' heads takes torch from `compresskv.system.later`."""
    code = """
import sys
from compresskv.methods import registry
registry.parse_methods("methods", ",".join(registry.methods()))
print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n"
