"""The presses of kvpress that are run, by name. Needs no kvpress."""

from collections.abc import Iterable

from compresskv.errors import ConfigError
from compresskv.system.suggest import suggestion

PRESSES = (
    "SnapKVPress",
    "ExpectedAttentionPress",
    "KnormPress",
    "ChunkKVPress(SnapKVPress)",
    "FinchPress",
    "AdaKVPress(SnapKVPress)",
    "AdaKVPress(ExpectedAttentionPress)",
    "CriticalAdaKVPress(SnapKVPress)",
    "KVzipPress",
)
"""Outer(Inner), each with kvpress's own defaults. The first five free memory; the others mask, so they hold
the whole prompt, KVzipPress twice until the next token: its keys are views that keep its own replay alive."""


def check_presses(names: Iterable[str]) -> None:
    """Refuse presses that the peers' process cannot run. Needs no kvpress.

    Raises:
        ConfigError: naming the first that is unknown.
    """
    for name in names:
        if name not in PRESSES:
            raise ConfigError(f"is unknown{suggestion(name, PRESSES)}", option="peers", value=name)


def method_name(press: str) -> str:
    """What records call a press."""
    return f"kvpress:{press}"
