"""Packed stores, by the bits of a number."""

from compresskv.cache.stores.packed import PackedStore
from compresskv.selection.precision import PRECISIONS


class Int8Store(PackedStore):
    """Keys and values in 8 bits."""

    precision = PRECISIONS["int8"]


class Int4Store(PackedStore):
    """Keys and values in 4 bits."""

    precision = PRECISIONS["int4"]


class Int2Store(PackedStore):
    """Keys and values in 2 bits."""

    precision = PRECISIONS["int2"]


class Int4K8Store(PackedStore):
    """Keys in 8 bits, values in 4."""

    precision = PRECISIONS["int4k8"]
