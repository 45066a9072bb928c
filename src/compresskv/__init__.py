"""CompressKV: answer long prompts with a small KV cache.

The public names are imported when they are first used, so that `compresskv --help` need not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compresskv.cache import CompressedCache
    from compresskv.compression import compressing
    from compresskv.errors import (
        CacheStateError,
        CompressKVError,
        ConfigError,
        ModelError,
        PlanError,
        ProfileError,
        PromptError,
    )
    from compresskv.generation import Generation, GenerationStats, ask
    from compresskv.method import LayerInputs, Method
    from compresskv.models import load
    from compresskv.plan import Plan, read_plan
    from compresskv.planning import make_plan
    from compresskv.profiles.profile import Profile, read_profile
    from compresskv.registry import register

__version__ = "0.1.0"

_HOME = {
    "CacheStateError": "errors",
    "CompressKVError": "errors",
    "CompressedCache": "cache",
    "ConfigError": "errors",
    "Generation": "generation",
    "GenerationStats": "generation",
    "LayerInputs": "method",
    "Method": "method",
    "ModelError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "Profile": "profiles.profile",
    "ProfileError": "errors",
    "PromptError": "errors",
    "ask": "generation",
    "compressing": "compression",
    "load": "models",
    "make_plan": "planning",
    "read_plan": "plan",
    "read_profile": "profiles.profile",
    "register": "registry",
}

__all__ = [
    "CacheStateError",
    "CompressKVError",
    "CompressedCache",
    "ConfigError",
    "Generation",
    "GenerationStats",
    "LayerInputs",
    "Method",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileError",
    "PromptError",
    "ask",
    "compressing",
    "load",
    "make_plan",
    "read_plan",
    "read_profile",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'compresskv' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compresskv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*globals(), *__all__])
