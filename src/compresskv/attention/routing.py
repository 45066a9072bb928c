"""Our attention functions, and how they find the cache layer whose keys they are given.

transformers calls `past_key_values.update(...)` and then, in the same thread, the attention function named in the
model's config, but never tells that function about the cache. So a `Routed` layer notes itself when it is updated, and
our attention function hands the call to it if the keys are the very tensor that the layer returned. This binds by
identity: it holds for several caches of one model, for threads, and for models that mix layer kinds.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compresskv.attention.kernels import Kernel, KernelMask, additive_mask
from compresskv.attention.masks import routed_mask
from compresskv.attention.opened import Opened
from compresskv.attention.pieces import let_read_in_pieces
from compresskv.attention.plain import (
    AttentionFunction,
    PlainAttention,
    grouped_attention,
    is_plain,
    scaling_of,
)
from compresskv.attention.prefill import causal_attention, causal_mask, is_faster, later_attention
from compresskv.attention.support import BASES, CANNOT, PREFIX, attention_modules, check_supported
from compresskv.errors import ModelError
from compresskv.models.shape import decoder_config

Observe = Callable[..., object]
_watched = threading.local()  # .observe: see `watching`


@contextmanager
def watching(observe: Observe) -> Iterator[None]:
    """Let `observe(layer, query, **kwargs)` see each attention over a routed layer's own keys in this thread.

    Args:
        observe: is given the `Routed` after its attention, the queries (B, H_q, T_new, D) of the newest tokens, and
            what the attention module gave to its attention function.
    """
    before, _watched.observe = getattr(_watched, "observe", None), observe
    try:
        yield
    finally:
        _watched.observe = before


_updated = threading.local()  # .layer: the Routed that this thread updated last and that awaits its attention
_shared = threading.local()  # .pairs: weak references to keys that later layers attend to as well, and to their Routed


class Routed(Protocol):
    """A cache layer as routing sees it: it is given the attention over its keys."""

    layer_idx: int
    """The layer's number in the model."""
    keys: Tensor | None
    """The very tensor that its last update returned, and that the model is to attend to."""
    values: Tensor | None
    """The same of the values."""
    awaits_attention: bool
    """Whether what was stored last has not been attended to."""
    shares_keys: bool
    """Whether later layers of the model, which have none of their own, may attend to its keys."""
    exact_prefill: bool
    """Whether prompts are read by the model's own attention function even where `causal_attention` is faster."""

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run `attention(query, mask)` over this layer's keys and values.

        Args:
            attention: the model's own attention function, its module and other arguments bound.
            query: (B, H_q, T_new, D), post-RoPE.
            mask: (B, 1, T_new, columns) bool or additive float; None where nothing is masked but the future.
            kwargs: the attention module, and what it gave to the attention function (scaling, softcap, ...).
        """

    def attend_shared(
        self,
        attention: AttentionFunction,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The same for a later layer that is handed these keys and values of this one; it evicts nothing.

        Args:
            query: (B, H_q, T_last, D), of the last of the new tokens: some models read no others there.
            keys, values: what this layer's last update returned.
        """


def await_attention(layer: Routed) -> None:
    """Hand this thread's next attention over the layer's keys to the layer."""
    layer.awaits_attention = True
    _updated.layer = layer


def is_routed(config: PretrainedConfig) -> bool:
    """Whether the model with this config uses our attention functions now."""
    return str(config._attn_implementation).startswith(PREFIX)


def _attention_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | KernelMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function: the layer's `attend` where the keys are a routed layer's, else the base function."""
    layer: Routed | None = getattr(_updated, "layer", None)
    is_own = layer is not None and layer.keys is key
    if not is_own:
        layer = _sharing(key)
    own_mask = None
    if isinstance(attention_mask, KernelMask):
        own_mask, attention_mask = attention_mask.mask, None
    if layer is None:
        function = _base_function(base, type(module))
        return function(module, query, key, value, attention_mask if own_mask is None else own_mask, **kwargs)
    kernel = None
    if base not in BASES:
        kernel = Kernel(base, own_mask)
        base = "sdpa" if is_plain(module, **kwargs) else "eager"
    if is_own:
        _take_over(layer, value, attention_mask)

    function = _base_function(base, type(module))
    plain = base == "sdpa" and is_plain(module, **kwargs)
    is_causal = kwargs.get("is_causal", getattr(module, "is_causal", True))

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if plain and not query.dtype == key.dtype == value.dtype:
            query, key, value = _cast_alike(query, key, value)
        if plain and query.shape[2] == 1:
            return grouped_attention(query, key, value, mask, kwargs.get("scaling")), None
        if kernel is not None and is_causal:
            output = kernel.read(module, query, key, value, mask, **kwargs)
            if output is not None:
                return output
        if plain and mask is None and is_causal and not layer.exact_prefill and is_faster(query, key):
            return causal_attention(query, key, value, kwargs.get("scaling")), None
        if mask is None and is_causal and 1 < query.shape[2] < key.shape[2]:  # a later piece of a prompt
            if plain:
                return later_attention(query, key, value, kwargs.get("scaling")), None
            mask = causal_mask(query.shape[2], key.shape[2], query.device)
        if kernel is not None and base == "eager":
            mask = additive_mask(mask, query, key)
        return function(module, query, key, value, mask, **kwargs)

    given = PlainAttention(attention, scaling_of(query, kwargs.get("scaling"))) if plain else attention
    if is_own:
        output = layer.attend(given, query, attention_mask, module=module, **kwargs)
        observe: Observe | None = getattr(_watched, "observe", None)
        if observe is not None:
            observe(layer, query, **kwargs)
        return output
    return layer.attend_shared(given, query, key, value, attention_mask, module=module)


def _cast_alike(*states: Tensor) -> list[Tensor]:
    """In one dtype, where `torch.autocast` would bring them to one: it knows PyTorch's kernels, and none of ours."""
    device_type = states[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(states)
    return [one.to(torch.get_autocast_dtype(device_type)) for one in states]


def _take_over(layer: Routed, value: Tensor, mask: Tensor | None) -> None:
    """Let a layer attend to what it stored last, and note it where later layers do so, too.

    Raises:
        ModelError: the model's attention is not one over these values alone.
    """
    if layer.values is not value:
        raise ModelError(f"layer {layer.layer_idx}: this model changes values between cache and attention{CANNOT}")
    if mask is not None and mask.shape[1] > 1:
        raise ModelError(f"layer {layer.layer_idx}: this model masks each of its attention heads on its own{CANNOT}")
    _updated.layer = None
    layer.awaits_attention = False
    if layer.shares_keys:
        kept = [pair for pair in getattr(_shared, "pairs", []) if pair[0]() is not None]
        _shared.pairs = [*kept, (weakref.ref(layer.keys), weakref.ref(layer))]


def _sharing(key: Tensor) -> Routed | None:
    """The layer whose last update returned these keys, where it is not that layer's own attention that has them."""
    for keys, layer in getattr(_shared, "pairs", []):
        if keys() is key:
            found: Routed | None = layer()
            return found
    return None


def _base_function(base: str, module_type: type[nn.Module]) -> AttentionFunction:
    """transformers' function for `base`; 'eager' is defined beside each model's attention module."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]
    return _eager_function(module_type)  # type: ignore[arg-type]  # torch's stubs hide type.__hash__


@functools.cache
def _eager_function(module_type: type[nn.Module]) -> AttentionFunction:
    try:
        return sys.modules[module_type.__module__].eager_attention_forward  # type: ignore[no-any-return]
    except AttributeError:
        raise ModelError(f"{module_type.__name__} has no eager attention function: load the model with sdpa") from None


def _register(base: str) -> None:
    """Let transformers know our function for `base`."""
    AttentionInterface.register(PREFIX + base, functools.partial(_attention_forward, base))
    # Without a mask function under our own name, transformers would build no mask at all and ignore padding.
    AttentionMaskInterface.register(PREFIX + base, functools.partial(routed_mask, base))


for _base in BASES:
    _register(_base)


_routed, _pieced = Opened(), Opened()


@contextmanager
def routing(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use our attention functions; its own come back when the last open context on it ends.

    Raises:
        ModelError: the model, or its attention implementation, cannot be used with a compressed cache.
    """
    config = decoder_config(model)  # which several models may share
    with _pieced.on(_own_part(model), lambda: _changed(model)), _routed.on(config, lambda: _route(model)):
        yield


def _own_part(model: PreTrainedModel) -> nn.Module:
    """A part that stands for a model: it is no other model's, and wrappers of the model have the same."""
    return next(iter(attention_modules(model).values()), [model])[0]


def _changed(model: PreTrainedModel) -> Callable[[], None]:
    check_supported(model)
    return let_read_in_pieces(model)


def _route(model: PreTrainedModel) -> Callable[[], None]:
    config, original = decoder_config(model), base_implementation(model)  # copies made inside bear our name
    _register(original)
    config._attn_implementation = PREFIX + original

    def undo() -> None:
        if is_routed(config):  # else it was set anew inside, and is meant to stay
            config._attn_implementation = original

    return undo


def check_routable(model: PreTrainedModel) -> None:
    """Refuse what `routing` would refuse, without routing anything; what is routed already was not refused.

    Raises:
        ModelError: as for `routing`.
    """
    if not is_routed(decoder_config(model)) or _own_part(model) not in _pieced:
        check_supported(model)


def base_implementation(model: PreTrainedModel) -> str:
    """'sdpa', say, inside of `routing` and outside."""
    return str(decoder_config(model)._attn_implementation).removeprefix(PREFIX)
