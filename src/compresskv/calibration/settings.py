"""What a calibration reads and how long it may answer."""

from dataclasses import dataclass, replace
from typing import Any

from compresskv.errors import ConfigError
from compresskv.system.check import check_least


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration reads. The default takes about twenty minutes on two cores for a model of 135M parameters."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Prompt lengths in tokens; those that do not fit the model's context are refused."""
    depths: tuple[float, ...] = (10, 30, 50, 70, 90)
    """Where needles stand, in percent of the document."""
    num_rotations: int | None = None
    """Documents for each length; None: as many as it takes for each needle to stand at each depth once."""
    max_new_tokens: int = 48
    """The longest answer."""
    error_documents: int = 2
    """Documents for each length on which layer errors are measured."""
    replay_documents: int = 2
    """Documents for each length that are read twice, to learn what a second reading attends to, and once more for the
    centres of queries."""
    haystack: tuple[str, ...] = ()
    """Text files or folders; empty: `DEFAULT_HAYSTACK`, Python's help topics."""
    needles: str | None = None
    """A file of needles; None: the project's own."""

    def __post_init__(self) -> None:
        """Validate where the settings are given.

        Raises:
            ConfigError: naming the option and its value.
        """
        if not self.lengths or min(self.lengths) < 256:
            problem = "must be whole numbers of at least 256 tokens"
            raise ConfigError(problem, option="lengths", value=self.lengths)
        if len(set(self.lengths)) != len(self.lengths):
            raise ConfigError("names a length twice", option="lengths", value=self.lengths)
        for name in ("max_new_tokens", "error_documents", "replay_documents", "num_rotations"):
            check_least(name, getattr(self, name))
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):  # NaN, too, fails this
            raise ConfigError("must lie between 0 and 100 percent", option="depths", value=self.depths)

    @classmethod
    def quick(cls, **changes: Any) -> "CalibrationSettings":
        """A first result in minutes: one short length, three depths, six documents."""
        return cls(**{"lengths": (1024,), "depths": (10, 50, 90), "num_rotations": 6, "error_documents": 1, **changes})

    def fitted(self, context_length: int | None) -> "CalibrationSettings":
        """The same without the lengths above a model's context; with the context's own where none is left."""
        if context_length is None or max(self.lengths) <= context_length:
            return self
        return replace(self, lengths=tuple(n for n in self.lengths if n <= context_length) or (context_length,))
