"""CompressKV: answer long prompts with a small KV cache.

The public names are imported when they are first used, so that `compresskv --help` need not wait for PyTorch.
"""

import importlib

from compresskv.version import __version__ as __version__

TYPE_CHECKING = False  # typing's own takes longer to import than all else here, and Ctrl-C is not watched for yet
if TYPE_CHECKING:
    from compresskv.answer import Generation, GenerationStats
    from compresskv.cache.cache import CompressedCache
    from compresskv.compression import compressing
    from compresskv.errors import (
        CacheStateError,
        CompressKVError,
        ConfigError,
        ModelError,
        PlanError,
        ProfileError,
        PromptError,
        SessionError,
    )
    from compresskv.generation import ask
    from compresskv.methods.base import Method
    from compresskv.methods.inputs import LayerInputs
    from compresskv.methods.registry import register
    from compresskv.models.load import load
    from compresskv.plans.make import make_plan
    from compresskv.plans.plan import Plan, read_plan
    from compresskv.profiles.profile import Profile, read_profile
    from compresskv.sessions.begin import open_session, read
    from compresskv.sessions.session import Session

_HOME = {
    "CacheStateError": "errors",
    "CompressKVError": "errors",
    "CompressedCache": "cache.cache",
    "ConfigError": "errors",
    "Generation": "answer",
    "GenerationStats": "answer",
    "LayerInputs": "methods.inputs",
    "Method": "methods.base",
    "ModelError": "errors",
    "Plan": "plans.plan",
    "PlanError": "errors",
    "Profile": "profiles.profile",
    "ProfileError": "errors",
    "PromptError": "errors",
    "Session": "sessions.session",
    "SessionError": "errors",
    "ask": "generation",
    "compressing": "compression",
    "load": "models.load",
    "make_plan": "plans.make",
    "open_session": "sessions.begin",
    "read": "sessions.begin",
    "read_plan": "plans.plan",
    "read_profile": "profiles.profile",
    "register": "methods.registry",
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
    "Session",
    "SessionError",
    "ask",
    "compressing",
    "load",
    "make_plan",
    "open_session",
    "read",
    "read_plan",
    "read_profile",
    "register",
]


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'compresskv' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compresskv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*globals(), *__all__])
