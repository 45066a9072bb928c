"""Keep transformers and the hub client off the terminal while we load."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

_TALKATIVE = ("torchao", "torch.utils._pytree")


def hush_torchao() -> None:
    """Keep torchao off the terminal: transformers imports it, and it tells of others' kernels."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet(*, downloads: bool = False) -> Iterator[None]:
    """Keep transformers' messages and progress bars off the terminal inside the `with`.

    Args:
        downloads: leave the progress bars of the hub's downloads as they are.
    """
    import huggingface_hub.utils
    import transformers.utils

    hub: Any = huggingface_hub.utils
    logs: Any = transformers.utils.logging
    bars, hub_bars = logs.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    levels = [(module, module.get_verbosity()) for module in (hub.logging, logs)]
    logs.disable_progress_bar()  # the hub's with it
    if downloads and hub_bars:
        hub.enable_progress_bars()
    for module, _ in levels:
        module.set_verbosity(logging.CRITICAL)  # what goes wrong is raised, and told in one line
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()
