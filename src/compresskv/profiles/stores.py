"""Which packed stores are safe for a model, as its profile says."""

import math
import warnings

from compresskv.profiles.profile import Profile
from compresskv.selection.precision import NATIVE, PRECISIONS

LOSSY = 0.05
"""Nats per token that a store may lose before anything is evicted: about what eviction to a quarter loses."""
NEXT_TO_NOTHING = 0.01
"""Nats per token: far below what eviction to a quarter loses, so that more tokens in fewer bits gain."""
UNMEASURED = "int8"
"""What no model that was tried minded (docs/stores.md)."""


def sparing_store(profile: Profile | None) -> str:
    """The store of the fewest bytes that loses next to nothing on the model, as its profile says."""
    losses = {} if profile is None else profile.store_losses
    if not losses:
        return UNMEASURED
    fewest_first = reversed(PRECISIONS)
    return next((name for name in fewest_first if losses.get(name, math.inf) <= NEXT_TO_NOTHING), NATIVE)


def warn_of_lossy_store(profile: Profile | None, store: str) -> None:
    """Say that the model bears a store badly, and which it bears better."""
    if profile is None or profile.store_losses.get(store, 0.0) <= LOSSY:
        return
    losses = {NATIVE: 0.0, **profile.store_losses}
    packed = [name for name, loss in profile.store_losses.items() if loss <= LOSSY]
    other = min(packed or [NATIVE], key=losses.__getitem__)
    warnings.warn(
        f"{profile.model_id} bears the store {store!r} badly: it loses {losses[store]:.2f} nats per token before "
        f"anything is evicted; {other!r} loses {losses[other]:.3f}",
        category=UserWarning,
        stacklevel=3,
    )
