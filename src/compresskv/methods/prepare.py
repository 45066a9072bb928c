"""A method made ready for a model: its options set, its profile found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv.errors import ConfigError
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.store import resolve_profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_method(
    model: PreTrainedModel,
    method: str | Method,
    profile: Profile | str | Path | None = None,
    *,
    is_shared: bool = False,
    **options: Any,
) -> Method:
    """The method with its options and, where it needs one, the model's profile.

    Args:
        is_shared: the profile is for another method, too: one that needs none leaves it alone.
    Raises:
        ConfigError, ProfileError: as for `compressing`.
    """
    if isinstance(method, type) and issubclass(method, Method):
        problem = f"is a class: pass an object, {method.__name__}(), or a name"
        raise ConfigError(problem, option="method", value=method.__name__)
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"options {', '.join(options)} are given beside a Method: set them on the Method")
        chosen = method
    elif isinstance(method, str) and "[" in method:
        if options:
            problem = f"has options already: leave out {', '.join(options)}"
            raise ConfigError(problem, option="method", value=method)
        chosen = registry.parse_method("method", method)
    else:
        chosen = registry.create(method, **options)
    if chosen.needs_profile:
        given = getattr(chosen, "profile", None)
        chosen = chosen.with_profile(resolve_profile(model, given if profile is None else profile, for_method=True))
    elif profile is not None and not is_shared:
        chosen.with_profile(profile if isinstance(profile, Profile) else read_profile(profile))  # refuses
    return chosen
