"""Whether anything is asked of us at all: found out in every process of vLLM, so by a look and without any import."""

import os
from collections.abc import Mapping
from typing import Any

KEY = "compresskv"
"""Names us in vLLM's `additional_config`, and in a request's `extra_args` (`vllm_xargs` in the OpenAI API)."""
_OF_CHUNKS, _OF_ANSWERS = ("chunk_budget", "chunk_tokens"), ("decode_budget", "decode_interval", "decode_method")
VARIABLES = {name: f"COMPRESSKV_{name.upper()}" for name in ("budget", "method", "profile", *_OF_CHUNKS, *_OF_ANSWERS)}
"""The settings in the environment. The budget switches on; the others alone do nothing."""


def given_settings(additional: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """What vLLM's `additional_config` holds for us, unchecked, and where that is nothing, the environment.

    Returns: None where we are switched off.
    """
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    if given is not None:
        return None if given is False else given
    found = {name: environ[variable] for name, variable in VARIABLES.items() if environ.get(variable)}
    return found if "budget" in found else None
