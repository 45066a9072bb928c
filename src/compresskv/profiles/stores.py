"""Which packed stores are safe for a model, as its profile says."""

import warnings

from compresskv.profiles.profile import Profile
from compresskv.selection.precision import NATIVE

LOSSY = 0.05
"""Nats per token that a store may lose before anything is evicted: about what eviction to a quarter loses."""


def safe_stores(profile: Profile) -> dict[str, float]:
    """The packed stores that lose at most `LOSSY`, and what they lose; empty where that was not measured."""
    return {name: loss for name, loss in profile.store_losses.items() if loss <= LOSSY}


def warn_of_lossy_store(profile: Profile | None, store: str) -> None:
    """Say that the model bears a store badly, and which it bears better."""
    loss = 0.0 if profile is None else profile.store_losses.get(store, 0.0)
    if profile is None or loss <= LOSSY:
        return
    safe = safe_stores(profile)
    other = min(safe, key=safe.__getitem__) if safe else NATIVE
    warnings.warn(
        f"{profile.model_id} bears the store {store!r} badly: it loses {loss:.2f} nats per token before anything is "
        f"evicted; {other!r} loses {safe.get(other, 0.0):.3f}",
        category=UserWarning,
        stacklevel=3,
    )
