"""CompressKV: answer long prompts with a small KV cache."""

from compresskv.cache import CompressedCache
from compresskv.compression import compressing
from compresskv.errors import (
    CacheStateError,
    CompressKVError,
    ConfigError,
    ModelError,
    ProfileError,
    PromptError,
)
from compresskv.generation import Generation, GenerationStats, ask

__version__ = "0.1.0"
__all__ = [
    "CacheStateError",
    "CompressKVError",
    "CompressedCache",
    "ConfigError",
    "Generation",
    "GenerationStats",
    "ModelError",
    "ProfileError",
    "PromptError",
    "ask",
    "compressing",
]
