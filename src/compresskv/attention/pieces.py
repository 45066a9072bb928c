"""Reading a prompt with bounded memory: each layer takes it a piece of tokens after another.

What a layer computes for a token depends on the tokens before it through attention alone, and their keys and values
are in the cache. So a layer may read the prompt in pieces, one layer after another, and nothing changes but rounding.
The whole prompt's hidden states are held (those that come in and those that go out), one layer's keys and values, and
what was retained in the layers before; queries, feed-forward activations and the like are of one piece.
"""

import functools
import inspect
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskv.attention.chunks import forward_in_chunks
from compresskv.attention.support import attention_modules
from compresskv.errors import ConfigError, ModelError
from compresskv.models.arguments import given_cache
from compresskv.models.shape import compressible_layers, decoder_config, heads_of, shares_keys
from compresskv.system.check import is_int

AUTO = "auto"
_AUTO_PIECE, _LEAST_PIECE = 4096, 64
"""Tokens: beyond about 4,096 a GPU's matrix products gain nothing more; far fewer would leave it idle."""
_TOKEN_WISE = re.compile(r"(mlp|feed_forward|ffn|moe|experts)$", re.IGNORECASE)
"""Names of a layer's parts that read each token by itself."""

PrefillMemory = int | str | None


class PiecewiseCache(Protocol):
    """A cache that may ask for pieces."""

    piece_tokens: int | None
    """Tokens that a layer reads at once; None: all."""

    def reading_piece(self, layer_idx: int, num_before: int, num_after: int) -> AbstractContextManager[None]:
        """While a layer reads a piece of what this forward pass brings: between so many tokens of it."""


def check_prefill_memory(prefill_memory: PrefillMemory) -> None:
    """Refuse what is neither 'auto' nor a number of bytes nor None.

    Raises:
        ConfigError: naming it.
    """
    is_number = isinstance(prefill_memory, int) and is_int(prefill_memory) and prefill_memory > 0
    if not (is_number or prefill_memory in (AUTO, None)):
        raise ConfigError("must be 'auto' or a number of bytes", option="prefill_memory", value=prefill_memory)


def piece_tokens(model: PreTrainedModel, prefill_memory: PrefillMemory) -> int | None:
    """The tokens of a piece, such that a layer's activations need about `prefill_memory` bytes; None: all at once.

    Args:
        prefill_memory: as for `compressing`.
    Raises:
        ConfigError: as for `check_prefill_memory`.
    """
    check_prefill_memory(prefill_memory)
    if not isinstance(prefill_memory, int):
        return None if prefill_memory is None else _AUTO_PIECE
    return max(_LEAST_PIECE, prefill_memory // _activations_nbytes(model))


def _activations_nbytes(model: PreTrainedModel) -> int:
    """About what one layer holds at once for one token, beside the hidden states of the whole prompt."""
    config = decoder_config(model)
    heads = heads_of(config, compressible_layers(model)[0])
    experts = getattr(config, "num_experts_per_tok", None)
    intermediate = getattr(config, "moe_intermediate_size", None) if experts else None
    intermediate = intermediate or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    intermediate = max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate
    attention = (4 * heads.num_query_heads + 3 * heads.num_kv_heads) * heads.head_dim
    return model.dtype.itemsize * (4 * int(config.hidden_size) + max(attention, 3 * int(intermediate) * (experts or 1)))


def let_read_in_pieces(model: PreTrainedModel) -> Callable[[], None]:
    """Let the model's layers read prompts in pieces, for caches that ask for it.

    Layers of offloaded models stay as they are: each piece would load the weights anew.

    Returns: what puts back how they read.
    """
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    replaced = [
        _replace(module, function) for module, function in _piecewise(model) if function is _decoder or not is_offloaded
    ]

    def undo() -> None:
        for module, before, own in replaced:
            if module.__dict__.get("forward") is not own:  # it was set anew inside, and is meant to stay
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before

    return undo


def _replace(module: nn.Module, function: Callable[..., Any]) -> tuple[nn.Module, Any, Any]:
    """Let calls of the module go through `function(forward, ...)`; what to put back, and what is there until then."""
    before, own = module.__dict__.get("forward"), module.forward
    module.forward = functools.wraps(own)(functools.partial(function, own))
    return module, before, module.forward


def _piecewise(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules that are called for a piece of the prompt at a time, the decoder that calls them, and how."""
    attending = attention_modules(model)
    # A layer that attends to another's keys needs those of the whole prompt at once.
    full = set() if shares_keys(decoder_config(model)) else set(compressible_layers(model))
    layers = dict(_decoder_layers(model, [modules[0] for modules in attending.values()]))
    for layer in layers.values():
        numbers: set[Any] = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        if len(numbers) == 1 and numbers <= full and not any(isinstance(part, nn.Conv1d) for part in layer.modules()):
            yield layer, functools.partial(_layer_in_pieces, numbers.pop())
        else:
            yield from ((part, _part_in_pieces) for name, part in layer.named_children() if _TOKEN_WISE.search(name))
    for name in {name.rsplit(".", 2)[0] for name in layers}:
        decoder = model.get_submodule(name)
        yield decoder, _decoder
        yield from ((part, _part_in_pieces) for part in decoder.children() if type(part).__name__.endswith("Norm"))


def _decoder_layers(model: PreTrainedModel, attending: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The members of the list of layers that hold these attention modules, with their names ('model.layers.3')."""
    for name, module in model.named_modules():
        if any(module is own for own in attending):
            parts = name.split(".")
            number = max((at for at, part in enumerate(parts) if part.isdigit()), default=0)
            if number >= 2:
                layer = ".".join(parts[: number + 1])
                yield layer, model.get_submodule(layer)


_reading = threading.local()  # .cache: see `_cache`


def _decoder(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's `forward`, in chunks where the cache asks for them; what it calls is told of the cache.

    Raises:
        ModelError: it was given one of ours, and read without it.
    """
    cache = given_cache(kwargs)
    if not hasattr(cache, "piece_tokens"):  # none of ours, and nothing of one of ours may be read
        return _telling(None, forward, *args, **kwargs)
    given = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs} if args else kwargs
    num_tokens = _num_tokens(**given)
    in_chunks = num_tokens is not None and getattr(cache, "reads_in_chunks", False)
    if in_chunks and len(ends := cache.chunk_ends(num_tokens)) > 1:
        return forward_in_chunks(functools.partial(_decoder, forward), cache, ends, **given)
    seen = cache.get_seq_length()
    is_long = cache.piece_tokens is not None and (num_tokens is None or num_tokens > cache.piece_tokens)
    wanted = is_long and not torch.is_grad_enabled() and not _returns_of_parts(forward, given)
    output = _telling(cache if wanted else None, forward, *args, **kwargs)
    if cache.get_seq_length() == seen:
        raise ModelError("the model read without the cache that it was given, as in training with checkpointing")
    return output


def _telling(cache: PiecewiseCache | None, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `forward`; what it calls in this thread is told of the cache."""
    before, _reading.cache = _cache(), cache
    try:
        return forward(*args, **kwargs)
    finally:
        _reading.cache = before


def _returns_of_parts(forward: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether a decoder is to return what parts of its layers compute: of a part that is called piece by piece, that
    would be as many tensors."""
    config = getattr(getattr(forward, "__self__", None), "config", None)
    return any(
        given.get(name) or getattr(config, name, False) for name in ("output_attentions", "output_router_logits")
    )


def _num_tokens(input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> int | None:
    """How many tokens a decoder is given; None: by another name than all of transformers' take."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    return None if given is None else int(given.shape[1])


def _cache() -> PiecewiseCache | None:
    """The cache that this thread's decoder reads into, where that asks for pieces."""
    return getattr(_reading, "cache", None)


def _ranges(num_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each piece that this thread's decoder shall read so many tokens in: of nearly equal length."""
    cache = _cache()
    if cache is None or cache.piece_tokens is None or not num_tokens:
        return [(0, num_tokens)]
    number = max(1, -(-num_tokens // cache.piece_tokens))
    ends = [num_tokens * count // number for count in range(number + 1)]
    return list(itertools.pairwise(ends))


def _part_in_pieces(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a part that reads each token by itself, and is given their hidden states alone."""
    if len(args) != 1 or kwargs or args[0].ndim != 3 or len(ranges := _ranges(args[0].shape[1])) == 1:
        return forward(*args, **kwargs)
    hidden = args[0]
    pieces = (forward(hidden[:, start:end]) for start, end in ranges)
    return _joined((_shaped(piece, hidden) for piece in pieces), ranges)


def _shaped(piece: Any, hidden: Tensor) -> Any:
    """A part's result with the rows of `hidden`: those with experts may give all tokens of a batch in one list."""
    if isinstance(piece, tuple):
        return (_shaped(piece[0], hidden), *piece[1:])
    return piece if piece.ndim == hidden.ndim else piece.view(len(hidden), -1, piece.shape[-1])


def _layer_in_pieces(layer_idx: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a decoder layer whose attention is over the whole prompt."""
    cache = _cache()
    if cache is None or (args and len(_ranges(args[0].shape[1])) == 1):  # every token that is decoded: quickly
        return forward(*args, **kwargs)
    names = list(inspect.signature(forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    num_tokens = given[names[0]].shape[1]
    ranges = _ranges(num_tokens)
    if len(ranges) == 1 or not all(_can_cut(name, value, num_tokens) for name, value in given.items()):
        return forward(*args, **kwargs)

    def pieces() -> Iterator[Any]:
        for start, end in ranges:
            with cache.reading_piece(layer_idx, start, num_tokens - end):
                yield forward(**{name: _cut(name, value, start, end, num_tokens) for name, value in given.items()})

    return _joined(pieces(), ranges)


_TOKEN_DIMS = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2, "attention_mask": -2}
"""Where an argument of a decoder layer counts tokens, if not in its second dimension."""


def _can_cut(name: str, value: Any, num_tokens: int) -> bool:
    """Whether a piece of this argument of a layer can be told."""
    if isinstance(value, (tuple, list)):
        return all(_can_cut(name, part, num_tokens) for part in value)
    if not isinstance(value, Tensor):
        return not isinstance(value, dict)
    if name == "attention_mask" and value.ndim != 4:
        return False
    dim = _TOKEN_DIMS.get(name, 1)
    return -value.ndim <= dim < value.ndim and value.shape[dim] == num_tokens


def _cut(name: str, value: Any, start: int, end: int, num_tokens: int) -> Any:
    """The piece of an argument that goes with tokens `start` to `end` of so many."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(name, part, start, end, num_tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        value = value[..., : value.shape[-1] - (num_tokens - end)]
    return value.narrow(_TOKEN_DIMS.get(name, 1), start, end - start)


def _joined(pieces: Iterator[Any], ranges: list[tuple[int, int]]) -> Any:
    """What the whole call would have returned: hidden states (B, T, H), or a tuple that begins with them."""
    whole: Tensor | None = None
    piece: Any = None
    for (start, end), piece in zip(ranges, pieces, strict=True):
        hidden = piece[0] if isinstance(piece, tuple) else piece
        if whole is None:
            whole = hidden.new_empty(hidden.shape[0], ranges[-1][1], *hidden.shape[2:])
        whole[:, start:end] = hidden
    return (whole, *piece[1:]) if isinstance(piece, tuple) else whole
