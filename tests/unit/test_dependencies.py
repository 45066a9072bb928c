"""The lowest versions that pyproject.toml claims are those that scripts/test runs against."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"vllm", "kvpress", "llama-cpp-python"}
"""In environments of their own, which scripts/ make from other constraints."""


def claimed() -> dict[str, str]:
    """Lowest version by name, of dependencies and extras."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11's
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    found = (re.fullmatch(r"([\w-]+)(\[\w+(?:,\w+)*\])?(?:[>=]=([\d.]+))?(?:,.*)?", one) for one in named)
    lowest = {match[1]: match[3] for match in found if match is not None}
    assert len(found_names := {re.split(r"[\[>=]", one)[0] for one in named}) == len(lowest), found_names
    return {name: version for name, version in lowest.items() if name not in {"compresskv", *ELSEWHERE}}


def pinned(constraints: str) -> dict[str, str]:
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    return dict(re.split("==", line.partition(";")[0].strip()) for line in lines if line and not line.startswith("#"))


def numbers(version: str) -> tuple[int, ...]:
    """Without zeros at the end: 4 is 4.0.0."""
    parts = [int(part) for part in version.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def test_the_oldest_environment_has_the_lowest_of_each_range() -> None:
    oldest = pinned("constraints-oldest.txt")
    wrong = {
        name: (version, oldest.get(name))
        for name, version in claimed().items()
        if version is None or numbers(oldest.get(name, "0")) != numbers(version)
    }
    assert wrong == {}


def test_the_newest_environment_pins_them_all() -> None:
    assert set(claimed()) <= set(pinned("constraints.txt"))
