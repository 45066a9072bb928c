"""Which store holds what a method chose."""

from torch import Tensor

from compresskv.cache.stores.base import Store
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.ragged import RaggedStore

STORES: list[type[Store]] = [DenseStore, RaggedStore]
"""In order of preference."""


def retained(store: Store, tokens: Tensor) -> Store:
    """A new store of the named tokens of `store`, which stays as it is. Waits for the device once.

    Args:
        tokens: (B, H, R) int64, ascending positions of tokens that are stored, H being 1 or the number of KV heads;
            `EMPTY_SLOT` begins what keeps fewer.
    Raises:
        CacheStateError: a token is not stored.
    """
    held, slots = store.held.choose(tokens)
    kind = next(kind for kind in STORES if kind.fits(held))
    return kind.gathered(store, held, slots)
