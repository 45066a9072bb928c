"""What PyTorch's operations make, and how much of that is still held by anybody."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Notes the storage of every tensor that is made within; `with Made() as made`."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int, UntypedStorage] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live(self) -> dict[int, int]:
        """Bytes of what was made within and is still held, by storage: model's and callers' own are not among it."""
        return {place: nbytes for place, (made, nbytes) in self._made.items() if not made.expired()}


def storage_of(tensor: Tensor) -> int:
    """As `Made.live` names it."""
    return int(tensor.untyped_storage()._cdata)


def _storages(values: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
