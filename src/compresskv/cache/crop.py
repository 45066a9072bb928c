"""Taking tokens back from the end of a cache."""

import copy
from typing import Any, Protocol

from compresskv.cache.stores.base import Store
from compresskv.errors import CacheStateError, ConfigError

NO_ASSISTANT = "Leave out assistant_model and prompt_lookup_num_tokens, or generate without this cache"


class Croppable(Protocol):
    """A compressed layer as it is seen here."""

    seen_tokens: int
    num_prompt_tokens: int
    store: Store | None


def cropped_length(layer: Croppable, max_length: int, decided_at: int | None) -> int:
    """The length that `crop` would leave of a compressed layer.

    Args:
        decided_at: tokens seen when the method chose; None where it did not yet.
    Raises:
        CacheStateError: it would cut into the prompt, or into tokens of which some were evicted.
        ConfigError: it is no int.
    """
    if not hasattr(max_length, "__index__"):
        raise ConfigError("must be an int", option="max_length", value=max_length)
    seen = layer.seen_tokens
    length = seen + max_length if max_length <= 0 else min(max_length, seen)
    # Assisted decoding reads its first drafts with the prompt, where they take part in the choice of what to keep,
    # and crops at once. Whether that is refused must not depend on whether the drafts were right.
    if decided_at is not None and (length < decided_at or seen == decided_at):
        raise CacheStateError(
            f"cannot crop a compressed cache of {seen} tokens to {length}: its prompt"
            f"{' and look-ahead have' if decided_at > layer.num_prompt_tokens else ' has'} {decided_at}. {NO_ASSISTANT}"
        )
    floor = 0 if layer.store is None else layer.store.held.floor
    if length < floor:
        raise CacheStateError(f"cannot crop a cache to {length} tokens: some of its first {floor} were evicted")
    return length


def check_other_crop(layer_idx: int, layer: Any, removed: int) -> None:
    """Refuse to take so many tokens back from one of transformers' own layers that cannot.

    Raises:
        CacheStateError: naming it.
    """
    try:
        copy.deepcopy(layer).crop(-removed)  # it holds a window or less
    except Exception as error:  # transformers' layers raise several kinds
        kind = type(layer).__name__
        raise CacheStateError(
            f"cannot crop this cache: layer {layer_idx} ({kind}) does not keep what it would need"
        ) from error
