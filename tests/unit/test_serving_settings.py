"""What a server evicts: settings, a request's own budget, the cut that follows, and the versions it runs with."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compresskv
from compresskv.errors import ConfigError
from compresskv.methods.vote import Vote
from compresskv.serving.settings import EvictionSpec, Settings, find_settings, plugins_with_ours, requested_budget


def test_switched_off_by_default() -> None:
    assert find_settings({}, {}) is None
    assert find_settings(None, {"COMPRESSKV_CACHE": "/somewhere"}) is None
    assert find_settings({"compresskv": False}, {"COMPRESSKV_BUDGET": "100"}) is None
    assert find_settings({}, {"COMPRESSKV_METHOD": "vote", "COMPRESSKV_PROFILE": "p"}) is None  # the budget switches on


@pytest.mark.parametrize(("text", "budget"), [("256", 256), ("3%", 0.03), ("0.5", 0.5)])
def test_the_environment(text: str, budget: int | float) -> None:
    environ = {"COMPRESSKV_BUDGET": text, "COMPRESSKV_METHOD": "streaming_llm[num_sinks=8]", "COMPRESSKV_PROFILE": "p"}
    assert find_settings({}, environ) == Settings(budget, "streaming_llm[num_sinks=8]", "p")
    assert find_settings({}, environ | {"COMPRESSKV_METHOD": "", "COMPRESSKV_PROFILE": ""}) == Settings(budget, "vote")


def test_additional_config_goes_before_the_environment() -> None:
    additional = {"compresskv": {"budget": 100, "window_size": 16, "local_weight": 0}}
    settings = find_settings(additional, {"COMPRESSKV_BUDGET": "200", "COMPRESSKV_PROFILE": "p"})
    assert settings == Settings(100, Vote(window_size=16, local_weight=0).label)
    assert find_settings({"compresskv": settings.to_dict()}, {}) == settings  # as it travels between processes
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"budget": "lots"}, "'lots' is no budget"),
        ({"budget": [64, 128]}, "one block table"),
        ({"method": "vote"}, "has no budget"),
        (256, "compresskv=256 is not an object"),
        ({"budget": 9, "method": "snapkv"}, "'snapkv' keeps other tokens in every layer.*'streaming_llm', 'vote'"),
        ({"budget": 9, "method": "vote,vote[num_heads=4]"}, "names 2 methods"),
        ({"budget": 9, "method": "vote[num_heads=4]", "window_size": 8}, "has options already.*'window_size'"),
        ({"budget": 9, "window_sise": 8}, "window_sise.*window_size"),
        ({"budget": 9, "lookahead": 2}, "lookahead=2"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(given: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        find_settings({"compresskv": given}, {})


@pytest.mark.parametrize(
    ("asked", "budget"),
    [(None, 300), (128, 128), ("128", 128), ("3%", 0.03), (0.5, 0.5), ({"budget": 7}, 7)]
    + [(off, None) for off in (False, "off", " OFF ", {"budget": False}, {"budget": "off"})],
    ids=str,
)
def test_a_request_asks_for_its_own_budget(asked: Any, budget: int | float | None) -> None:
    assert requested_budget({"compresskv": asked, "other": 1}, 300) == budget


@pytest.mark.parametrize(
    ("exported", "plugins"),
    [(None, None), ("", "compresskv"), ("other", "other,compresskv"), ("a,compresskv", None)],
)
def test_vllm_loads_our_plugin_where_only_others_are_named(exported: str | None, plugins: str | None) -> None:
    environ = {} if exported is None else {"VLLM_PLUGINS": exported}
    assert plugins_with_ours(environ) == ({} if plugins is None else {"VLLM_PLUGINS": plugins})


def test_requests_that_say_nothing() -> None:
    assert requested_budget(None, 300) == requested_budget({}, 300) == 300


@pytest.mark.parametrize(
    "asked",
    [0, -3, 1.5, "none", True, [64], {}, {"budget": 9, "window": 8}, {"method": "vote"}, 2**63, "9" * 30],
    ids=str,
)
def test_requests_that_cannot_work(asked: Any) -> None:
    with pytest.raises(ConfigError, match=r"budget|compresskv"):
        requested_budget({"compresskv": asked}, 300)


def test_what_is_evicted_follows_from_length_and_budget() -> None:
    settings = Settings(200)
    assert settings.eviction_specs(1000, None) == (EvictionSpec(1000, 1000, 200, 32),)
    (narrowed,) = settings.eviction_specs(1000, {"compresskv": "3%"})
    assert narrowed == EvictionSpec(1000, 1000, 30, 15)
    assert narrowed.num_lost == 970
    for whole in (settings.eviction_specs(200, None), settings.eviction_specs(5000, {"compresskv": "off"})):
        assert whole == ()
    assert Settings(1.0).eviction_specs(777, None) == ()
    wide = Settings(1, "vote[narrow=false]")
    assert wide.eviction_specs(9, None) == (EvictionSpec(9, 9, 1, 9),)  # no longer than the prompt


@pytest.mark.parametrize("label", ["vote", "streaming_llm"])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 40, 200])
def test_the_last_chunk_is_never_a_single_token(label: str, budget: int) -> None:
    """vLLM takes it for a decode step, and may replay it as a CUDA graph, in which no query is seen."""
    for num_prompt in (2, 3, 33, 1000):
        for spec in Settings(budget, label).eviction_specs(num_prompt, None):
            assert spec.last_chunk == min(max(2, spec.window_size), num_prompt)


def test_the_entry_point_is_cheap() -> None:
    """vLLM imports it in every process, and asks it about every configuration, switched on or not."""
    code = """
import sys
from types import SimpleNamespace
from compresskv.serving.plugin import configure
before = set(sys.modules)
for additional in (None, {}, {"other": 1}, {"compresskv": False}):
    configure(SimpleNamespace(model_config=object(), additional_config=additional))
print({"torch", "transformers", "vllm"} & set(sys.modules), set(sys.modules) - before)
"""
    environment = os.environ | {"COMPRESSKV_METHOD": "vote", "COMPRESSKV_BUDGET": ""}
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert output.strip() == "set() set()"


def test_nothing_else_needs_this_package_or_vllm() -> None:
    folder = Path(str(compresskv.__file__)).parent
    users = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"^\s*(from|import) (vllm|compresskv\.serving)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    # the last runs in vLLM's own environment
    assert {name for name in users if not name.startswith("serving/")} == {
        "cli/serve.py",
        "peers/engines.py",
    }


def test_one_token_is_not_all_of_them() -> None:
    settings = Settings(256)
    assert settings.eviction_specs(777, {"compresskv": 1.0}) == ()
    assert settings.eviction_specs(777, {"compresskv": 1}) == (EvictionSpec(777, 777, 1, 1),)
