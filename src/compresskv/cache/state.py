"""A compressed cache as plain tensors and facts for JSON, and back: what is written to a file."""

from typing import Any

import torch
from torch import Tensor

from compresskv.cache.cache import CompressedCache
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.stores.retain import PACKED_STORES, STORES
from compresskv.errors import CacheStateError
from compresskv.system.convert import Count, convert

_NUMBERS = ("num_prompt_tokens", "_decided_at", "full_nbytes", "_retained_nbytes")
_STORES = {kind.__name__: kind for kind in (*STORES, *PACKED_STORES.values())}
_MADE_ANEW = ("dtype", "device")

State = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""Tensors by name, and one dict of facts for each layer."""

_Own = tuple[dict[str, Tensor], dict[str, Any]]
"""The same of one layer."""


def cache_state(cache: CompressedCache) -> State:
    """All that a cache holds after its prompt was read.

    Raises:
        CacheStateError: nothing was read, or a layer holds what cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    facts = []
    for layer_idx, layer in enumerate(cache.layers):
        own, told = _compressed(layer) if isinstance(layer, CompressedLayer) else _other(layer_idx, layer)
        tensors |= {f"{layer_idx}.{name}": tensor.detach().contiguous() for name, tensor in own.items()}
        facts.append({"kind": type(layer).__name__, **told})
    return tensors, facts


def restore_cache(cache: CompressedCache, state: State) -> None:
    """Let an empty cache of the same model hold what `cache_state` gave.

    Raises:
        CacheStateError: it is of other layers.
    """
    tensors, facts = state
    if len(facts) != len(cache.layers):
        raise CacheStateError(f"it has {len(facts)} layers, the model {len(cache.layers)}")
    for layer_idx, (layer, told) in enumerate(zip(cache.layers, facts, strict=True)):
        if told["kind"] != type(layer).__name__:
            raise CacheStateError(f"its layer {layer_idx} is a {told['kind']}, the model's a {type(layer).__name__}")
        begin = f"{layer_idx}."
        own = {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}
        if isinstance(layer, CompressedLayer):
            _restore_compressed(layer, own, told)
        else:
            _restore_other(layer_idx, layer, own, told)


def _compressed(layer: CompressedLayer) -> _Own:
    if layer.store is None or layer.in_prefill:
        raise CacheStateError(f"layer {layer.layer_idx} of the cache has not read a whole prompt")
    told = {"store": type(layer.store).__name__, **{name: getattr(layer, name) for name in _NUMBERS}}
    strengths = {} if layer.strengths is None else {"strengths": layer.strengths}
    return layer.store.state() | strengths, told


def _restore_compressed(layer: CompressedLayer, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    if told["store"] not in _STORES:
        raise CacheStateError(f"its layer {layer.layer_idx} is in a {told['store']}, which is unknown here")
    layer.adopt_store(_STORES[told["store"]].from_state(tensors))
    layer.strengths = tensors.get("strengths")
    for name in _NUMBERS:
        setattr(layer, name, convert(told[name], Count))


def _other(layer_idx: int, layer: Any) -> _Own:
    """Of a layer of transformers' own: the attributes that are tensors or numbers, also in dicts by number."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name in _MADE_ANEW:
            continue
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for part_name, part in parts.items():
            if isinstance(part, Tensor):
                tensors[part_name] = part
            elif part is None or isinstance(part, (bool, int, float, str)):
                told[part_name] = part
            else:
                kind = type(layer).__name__
                raise CacheStateError(f"layer {layer_idx} ({kind}) cannot be saved: it holds {name}={part!r}")
    return tensors, {"numbers": told}


def _restore_other(layer_idx: int, layer: Any, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    for place, value in {**told["numbers"], **tensors}.items():
        name, _, key = place.partition(".")
        if name not in vars(layer) or name in _MADE_ANEW:
            raise CacheStateError(f"its layer {layer_idx} holds {name!r}, the model's does not")
        own = vars(layer)[name]
        if isinstance(own, (bool, int, float, str)) and type(value) is not type(own):
            raise CacheStateError(f"its layer {layer_idx} holds {name}={value!r}, where the model's holds {own!r}")
        if key:
            vars(layer)[name][int(key)] = value
        else:
            vars(layer)[name] = value
    numbers = [tensor for tensor in tensors.values() if torch.is_floating_point(tensor)]
    if numbers:
        layer.dtype, layer.device = numbers[0].dtype, numbers[0].device
