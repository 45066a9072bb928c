"""Methods that need a model's profile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from compresskv.errors import ProfileError
from compresskv.methods.base import Method

if TYPE_CHECKING:
    from compresskv.profiles.profile import Profile

_M = TypeVar("_M", bound="ProfiledMethod")


@dataclass(frozen=True)
class ProfiledMethod(Method):
    """Base of methods that look into a profile. Beside another base it stands last: dataclasses take fields so."""

    needs_profile = True

    profile: Profile | None = field(default=None, kw_only=True)

    def with_profile(self: _M, profile: Profile) -> _M:
        """The method with a model's measurements.

        Raises:
            ProfileError: the profile lacks what the method needs.
        """
        if (problem := self.lacks(profile)) is not None:
            raise ProfileError(problem)
        return replace(self, profile=profile)

    def lacks(self, profile: Profile) -> str | None:
        """What a profile does not tell that the method needs, as an error's message; None: it tells all."""
        return None

    @property
    def measured(self) -> Profile:
        """The profile.

        Raises:
            ProfileError: none was given.
        """
        if self.profile is None:
            problem = f"method {self.name!r} needs a profile of the model: make one with 'compresskv profile MODEL'"
            raise ProfileError(problem)
        return self.profile
