"""A model reads a prompt and continues it greedily, token by token, with any cache."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from compresskv.errors import ModelError, PromptError
from compresskv.models.arguments import cache_argument
from compresskv.models.place import input_device
from compresskv.models.shape import decoder_config

OnToken = Callable[[int], object]
"""Called with each token as it comes; the text ends where it returns True."""


def check_tokens(model: PreTrainedModel, *token_ids: int) -> None:
    """Refuse what has no row among the model's embeddings: on a GPU it would end all that is computed there.

    Raises:
        PromptError: naming the first such token.
    """
    vocabulary = decoder_config(model).vocab_size
    with suppress(NotImplementedError):  # a quantised weight has other shapes, and a wrapped one does not tell
        vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", vocabulary)
    for token in token_ids:
        if not 0 <= token < vocabulary:
            problem = f"is no token of this model: its vocabulary has {vocabulary}"
            raise PromptError(problem, option="token_ids", value=token)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Tensor:
    """Read the prompt (1, T) and return the last position's logits (vocab,).

    Raises:
        PromptError: it holds tokens that the model does not know; its tokenizer is another's.
    """
    check_tokens(model, *map(int, input_ids.aminmax()))
    return last_logits(model, input_ids, cache)[0]


@torch.no_grad()
def decode_one_token(model: PreTrainedModel, token: int, cache: Cache) -> Tensor:
    """Feed one token and return the next position's logits (vocab,)."""
    return last_logits(model, torch.tensor([[token]], device=input_device(model)), cache)[0]


@torch.no_grad()
def last_logits(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Tensor:
    """Read tokens (B, T) and return the last position's logits (B, vocab): of no other are they computed."""
    last_only = {"logits_to_keep": 1} if _keeps_logits(type(model)) else {}  # type: ignore[arg-type]
    with _reading(model) if input_ids.shape[1] > 1 else nullcontext():  # one token's hidden state is dense
        given = {**last_only, cache_argument(model): cache}
        logits: Tensor = model(input_ids=input_ids, use_cache=True, **given).logits[:, -1]
    return logits


@contextmanager
def _reading(model: PreTrainedModel) -> Iterator[None]:
    with _no_images(model), _dense_hidden_state(model):
        yield


@contextmanager
def _no_images(model: PreTrainedModel) -> Iterator[None]:
    """Tell of a model that reads no text alone.

    Raises:
        ModelError: it asks for images.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        parameters = inspect.signature(type(model).forward).parameters
        if any(name in str(error) for name in parameters if "pixel" in name or "image" in name):
            raise ModelError(f"{type(model).__name__} reads no text without images") from error
        raise


@contextmanager
def _dense_hidden_state(model: PreTrainedModel) -> Iterator[None]:
    """Give the output embedding the last hidden state as a tensor of its own.

    As a slice of all hidden states it keeps their strides, and the CPU's matrix library then takes a path that is
    twenty times slower (75 ms instead of 4 for SmolLM2-135M in bfloat16).
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_densify)
    try:
        yield
    finally:
        handle.remove()


def _densify(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = inputs
    if hidden.shape[1] == 1:  # such a slice counts as contiguous: only a clone changes its strides
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return (hidden, *rest)


@functools.cache
def _keeps_logits(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    first: int,
    cache: Cache,
    max_new_tokens: int,
    on_token: OnToken | None = None,
) -> list[int]:
    """Continue greedily from the token `first` until the end-of-text token or `max_new_tokens`.

    Args:
        on_token: called with each token, the first and the last included, as it comes; True from it ends the text.
    """
    ends = end_tokens(model, tokenizer)
    token_ids = [first]
    while True:
        stopped = on_token is not None and on_token(token_ids[-1]) is True
        if stopped or token_ids[-1] in ends or len(token_ids) >= max_new_tokens:
            break
        token_ids.append(int(decode_one_token(model, token_ids[-1], cache).argmax()))
    return token_ids


def decode_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, firsts: list[int], cache: Cache, max_new_tokens: int
) -> list[list[int]]:
    """`decode` for each row of a cache, side by side: they share each reading of the weights.

    Args:
        firsts: each row's first token.
    """
    ends, rows = end_tokens(model, tokenizer), [[first] for first in firsts]
    tokens = torch.tensor(firsts, device=input_device(model))
    for _ in range(max_new_tokens - 1):
        if all(row[-1] in ends for row in rows):
            break
        tokens = last_logits(model, tokens[:, None], cache).argmax(dim=-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row[-1] not in ends:
                row.append(token)
    return rows


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}
