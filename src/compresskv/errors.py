"""The errors CompressKV raises on purpose. Each message is one line that names the option and its value."""

from pathlib import PurePath

_MOST_SHOWN = 500
"""Characters of a value: longer than any name of a file that can be opened, as most systems have it."""


class CompressKVError(Exception):
    """Base of every error that CompressKV raises on purpose."""

    def __init__(self, problem: str, *, option: str | None = None, value: object = None) -> None:
        """Say what is wrong.

        Args:
            problem: where `option` is given, what follows its name and value: 'must be at least 1', ': no such file'.
                Other parameters in it are written as in Python, truncate='middle': the command line shows them, too,
                as they are typed there.
            option: the parameter at fault, by its name in Python; the command line shows it as it is typed there.
            value: what it was given; None names the parameter alone.
        """
        super().__init__(problem if option is None else told(f"{option}={shown(value)}", problem))
        self.problem = problem
        self.option = option
        self.value = value


def shown(value: object) -> str:
    """A value in a message: a path as its text, and no more of a document or a plan than its beginning."""
    text = " ".join(repr(str(value) if isinstance(value, PurePath) else value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def told(what: str, problem: str) -> str:
    """A named value and what is wrong with it, as one text."""
    return f"{what}{problem}" if problem.startswith(":") else f"{what} {problem}"


class ConfigError(CompressKVError, ValueError):
    """An option has a value that cannot work: a budget of 0, an unknown method, a question without text."""


class PromptError(CompressKVError, ValueError):
    """The document or question cannot be used: empty, binary, or longer than the model's context."""


class ModelError(CompressKVError):
    """A model cannot be found, read, downloaded, or cannot be used with a compressed cache."""


class ProfileError(CompressKVError):
    """A profile is missing, malformed, or belongs to another model."""


class PlanError(CompressKVError, ValueError):
    """A plan is malformed, or belongs to another model or prompt."""


class SessionError(CompressKVError):
    """A saved session is malformed, altered, of a newer release, or of another model."""


class DataError(CompressKVError):
    """Benchmark data or records are missing, malformed, or belong to another run."""


class CacheStateError(CompressKVError, RuntimeError):
    """A compressed cache was used in a way that its state does not allow."""


class ServingError(CompressKVError):
    """vLLM is asked for what CompressKV inside it does not do. No ValueError, which pydantic would decorate."""


def first_line(err: BaseException) -> str:
    """The first line of an error's text that says anything, or its type's name."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__
