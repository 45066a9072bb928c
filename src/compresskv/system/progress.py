"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done, 0 to 1; None where it is not known."""


def silent(_message: str, _fraction: float | None) -> None:
    """Tell nobody."""
