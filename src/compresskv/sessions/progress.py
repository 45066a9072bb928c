"""How far the reading of a document is, whatever reads it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresskv.attention.support import attention_modules

OnRead = Callable[[int, int], None]
"""Called with (steps done, steps): a step is one token in one attention layer."""


@contextmanager
def telling(model: PreTrainedModel, num_tokens: int, on_read: OnRead | None) -> Iterator[None]:
    """Tell `on_read` while the model reads about `num_tokens` tokens, some of them twice; all of them in the end."""
    modules = [module for own in attention_modules(model).values() for module in own]
    if on_read is None or not modules:
        yield
        return
    steps, done = num_tokens * len(modules), 0

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        nonlocal done
        hidden = args[0] if args else kwargs.get("hidden_states")
        done = min(done + (0 if hidden is None else hidden.shape[1]), steps - 1)
        on_read(done, steps)

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    on_read(steps, steps)
