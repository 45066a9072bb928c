"""Methods that need a model's profile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from compresskv.errors import ProfileError
from compresskv.methods.base import Method
from compresskv.profiles.profile import RANKS_ALONE

if TYPE_CHECKING:
    from compresskv.profiles.profile import Profile

_M = TypeVar("_M", bound="ProfiledMethod")


@dataclass(frozen=True)
class ProfiledMethod(Method):
    """Base of methods that look into a profile. Beside another base it stands last: dataclasses take fields so."""

    needs_profile = True
    compares_layers: ClassVar[bool] = False
    """Whether heads of different layers are compared, which ranks within layers do not allow."""

    profile: Profile | None = field(default=None, kw_only=True)

    def with_profile(self: _M, profile: Profile) -> _M:
        """The method with a model's measurements.

        Raises:
            ProfileError: the profile lacks what the method needs.
        """
        if self.compares_layers and profile.comparable_scores is None:
            compares = f"method {self.name!r} compares heads of different layers"
            raise ProfileError(f"{compares}, but the profile of {profile.model_id} {RANKS_ALONE}")
        return replace(self, profile=profile)

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
