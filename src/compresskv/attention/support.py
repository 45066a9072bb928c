"""What a model must be for its cache to be compressed: told by its config and its classes, before anything is run.

A model class need not be known here by name. What counts is what its attention modules do: whether each full-attention
layer has one, whether it looks its attention function up by the config's `_attn_implementation`, and whether it stores
its keys in transformers' cache.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel, cache_utils

from compresskv.errors import ModelError
from compresskv.models.shape import compressible_layers, decoder_config, shares_keys

BASES = ("eager", "sdpa")
"""The attention implementations that every call of ours may go to. A model may have another: see `kernels`."""
PREFIX = "compresskv_"
"""Before a base's name: our function, which hands over to it."""

CANNOT = ", so its cache cannot be compressed"
"""The end of what is said of a model's attention."""

_PROMPTS_OF_EMBEDDINGS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"}
"""The kinds of peft's prompt learning that put learned embeddings before the prompt, which are read like tokens."""
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The table that a module must look its attention function up in."""


def check_supported(model: PreTrainedModel) -> None:
    """Refuse what cannot work, before anything is computed.

    Raises:
        ModelError: one line that says what and, where there is a way out, what to do.
    """
    name, config = type(model).__name__, decoder_config(model)
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model: only decoder-only models have a prompt cache to compress"
        )
    if isinstance(model, PreTrainedModel) and hasattr(model, "generate") and not isinstance(model, GenerationMixin):
        raise ModelError(f"{name} generates in a way of its own, not a token after another")
    if not _uses_default_cache(model):
        raise ModelError(f"{name} uses a cache of its own, which cannot be compressed{_newer(config)}")
    if shares_keys(config):
        _check_sharing(name, model)
    _check_adapter(name, model)
    newer, older = "is_activation_checkpointing", "is_gradient_checkpointing"
    if model.training and getattr(model, newer if hasattr(model, newer) else older, False):
        raise ModelError(f"{name} is trained with gradient checkpointing, which drops the cache: call model.eval()")
    _check_modules(name, model)


def _check_sharing(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError where layers are not handed the very keys of those that they share them with."""
    if not hasattr(cache_utils, "DummyLayer"):
        kind = "a cache of its own, which shares keys between layers and"
        raise ModelError(f"{name} uses {kind} cannot be compressed: newer transformers may have none")
    if len(set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}) > 1:
        raise ModelError(f"{name} shares keys between layers that lie on several devices{CANNOT}")


def _check_adapter(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError where peft puts learned keys and values before the prompt, in a cache of its own."""
    adapter: Any = getattr(model, "active_peft_config", None)
    kind = str(getattr(adapter, "peft_type", "")).removeprefix("PeftType.")
    if getattr(adapter, "is_prompt_learning", False) and kind not in _PROMPTS_OF_EMBEDDINGS:
        kept = "keeps learned keys and values in a cache of its own"
        raise ModelError(f"{name}: its {kind} adapter {kept}, which cannot be compressed: LoRA and prompt tuning can")


def _uses_default_cache(model: PreTrainedModel) -> bool:
    """Whether `generate` would give the model transformers' usual cache."""
    asked = getattr(type(model), "_supports_default_dynamic_cache", None)
    return asked is None or bool(asked())


def _newer(config: Any) -> str:
    """A way out, for models whose layers newer transformers keep in its usual cache."""
    return ": newer transformers may have none" if getattr(config, "layer_types", None) else ""


def _check_modules(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError unless each full-attention layer has one module that attends as we need it to."""
    modules = attention_modules(model)
    if not modules:
        raise ModelError(f"{name} does not use transformers' attention interface{CANNOT}")
    for layer_idx in compressible_layers(model):
        own = modules.get(layer_idx, [])
        if not own:
            raise ModelError(
                f"layer {layer_idx} of {name} has no attention that can be found, so it cannot be compressed"
            )
        if len(own) > 1:
            raise ModelError(f"layer {layer_idx} of {name} has more than one attention, which cannot be told apart")
        if not _is_self_attention(type(own[0])):  # type: ignore[arg-type]
            raise ModelError(f"layer {layer_idx} of {name} has cross-attention, whose cache cannot be compressed")
        if is_encoder(model, own[0]):
            raise ModelError(f"{name} reads in both directions: only decoders have a prompt cache to compress")
        if hasattr(own[0], "expand_kv"):
            raise ModelError(f"{name} keeps latent keys (multi-head latent attention), which cannot be compressed")


def attention_modules(model: PreTrainedModel) -> dict[int, list[nn.Module]]:
    """The decoder's modules that attend by transformers' interface over keys in a cache, by the number of the layer."""
    config = decoder_config(model)
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int) and getattr(module, "config", None) is config and _attends(type(module)):  # type: ignore[arg-type]
            found.setdefault(layer_idx, []).append(module)
    return found


@functools.cache
def _attends(module_class: Any) -> bool:
    """Whether a class calls transformers' attention functions, and `update` of a cache."""
    names = {name for function in _functions(module_class) for name in function.__code__.co_names}
    return _INTERFACE in names and "update" in names


def _functions(module_class: Any) -> Iterator[Any]:
    """The functions of a class and its bases, without torch's."""
    for kind in module_class.__mro__:
        if not kind.__module__.startswith("torch."):
            for member in vars(kind).values():
                function = inspect.unwrap(member) if callable(member) and not isinstance(member, type) else member
                if inspect.isfunction(function):
                    yield function


@functools.cache
def _is_self_attention(module_class: Any) -> bool:
    """Whether modules of a class take keys from what queries come from."""
    return not any("cross" in name for name in inspect.signature(module_class.forward).parameters)


def is_encoder(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a token attends to those behind it: BERT and its like, unless their config makes decoders of them.

    A model of images and text may read its prompt so (PaliGemma), and then writes as a decoder.
    """
    both_ways = getattr(module, "is_causal", True) is False and decoder_config(model) is model.config
    return both_ways or getattr(module, "is_decoder", True) is False
