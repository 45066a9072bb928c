"""Which packed stores a model bears, as its profile says."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping

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


def best_store(profile: Profile | None, share_held: Callable[[str], float]) -> str:
    """The store that loses least where bytes are given: the fewer bits, the more tokens for them, of a document whose
    questions are not known. What packing loses and what eviction loses are added. `sparing_store` where the profile
    does not tell both.

    Args:
        share_held: of the document's tokens, by the name of a store; 0 where it has no room for one.
    """
    if profile is None or not profile.document_losses or not profile.store_losses:
        return sparing_store(profile)
    losses = {NATIVE: 0.0, **{name: loss for name, loss in profile.store_losses.items() if name in PRECISIONS}}
    shares = {name: share_held(name) for name in losses}
    return min(losses, key=lambda name: losses[name] + loss_of_share(profile.document_losses, shares[name]))


def loss_of_share(document_losses: Mapping[str, float], share: float) -> float:
    """Nats per token where so much of a document is kept: between those measured, a straight line over the share's
    logarithm; below them, on with the mean slope of all.

    Args:
        document_losses: as of a profile, not empty.
        share: 0 to 1; infinite nats where it is 0.
    """
    if share <= 0:
        return math.inf
    points = [*sorted((math.log(float(text)), loss) for text, loss in document_losses.items()), (0.0, 0.0)]
    place, (lowest, most) = math.log(min(share, 1.0)), points[0]
    if place < lowest:
        return most * place / lowest
    pairs = itertools.pairwise(points)
    (left, high), (right, low) = next(pair for pair in pairs if place <= pair[1][0])
    return high + (low - high) * (place - left) / (right - left)


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
