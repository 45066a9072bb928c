"""Which store holds what a method chose."""

from torch import Tensor

from compresskv.cache.stores.base import Store
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.packed import PackedStore
from compresskv.cache.stores.packed_kinds import Int2Store, Int4K8Store, Int4Store, Int8Store
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision

STORES: list[type[Store]] = [DenseStore, RaggedStore]
"""For what is held as the model computed it, in order of preference."""
PACKED_STORES: dict[str, type[PackedStore]] = {
    kind.precision.name: kind for kind in (Int8Store, Int4K8Store, Int4Store, Int2Store)
}
"""For what is held in fewer bits, by the name of the precision."""


def retained(store: Store, tokens: Tensor, precision: Precision = PRECISIONS[NATIVE]) -> Store:
    """A new store of the named tokens of `store`, which stays as it is. Waits for the device once.

    Args:
        tokens: (B, H, R) int64, ascending positions of tokens that are stored, H being 1 or the number of KV heads;
            `EMPTY_SLOT` begins what keeps fewer.
        precision: of the new store.
    Raises:
        CacheStateError: a token is not stored.
    """
    held, slots = store.held.choose(tokens)
    kinds = [PACKED_STORES[precision.name]] if precision.is_packed else STORES
    kind = next(kind for kind in kinds if kind.fits(held))
    return kind.gathered(store, held, slots)
