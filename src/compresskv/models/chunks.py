"""Prompts that transformers' `generate` reads in chunks (`prefill_chunk_size`), which it tells nobody."""

import sys
from types import FrameType

_FILE, _FUNCTION = ("transformers", "generation", "utils"), "_prefill"


def chunked_prompt_length() -> int | None:
    """The length of the prompt that `generate` is reading in chunks, somewhere below us on the stack.

    Neither the model nor the cache is told: a chunk looks like a whole prompt, and evicting after it would be wrong. So
    this looks for the call itself. None where there is none, as in every forward pass that is no chunk.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == ".".join(_FILE):
            config, input_ids = frame.f_locals.get("generation_config"), frame.f_locals.get("input_ids")
            if input_ids is None or getattr(config, "prefill_chunk_size", None) is None:
                return None
            return int(input_ids.shape[1])
        frame = frame.f_back
    return None
