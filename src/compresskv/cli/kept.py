"""What commands do with a session in place of a document."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv.cli.terminal import Bar
from compresskv.cli.typed import is_typed
from compresskv.errors import ConfigError
from compresskv.sessions.header import is_cut, is_session, read_facts

if TYPE_CHECKING:
    from compresskv.sessions.session import Session

SUFFIX = ".kvc"


def names_session(document: str) -> bool:
    """Whether a command's document is a session, or was one by its name and beginning before it was cut short."""
    return document != "-" and (is_session(document) or (document.endswith(SUFFIX) and is_cut(document)))


def check_unused(**options: Any) -> None:
    """Refuse options that say how a document is to be read, where it was read before.

    Args:
        options: what a command has been given, or its defaults.
    Raises:
        ConfigError: one of them was typed.
    """
    for option, value in options.items():
        if is_typed(option):
            problem = "has no place here: a session was read and cut before"
            raise ConfigError(problem, option=option, value=None if value is True else value)


def load_session(path: str | Path, model: str, dtype: str | None, device: str | None) -> "Session":
    """The session of a file with its model: the one that it was read with, unless another place of it is given.

    Raises:
        SessionError, ModelError, ConfigError: as for `open_session` and `load`; a damaged file, or a dtype that does
            not fit it, before the model is loaded.
    """
    facts = read_facts(path)
    if dtype not in (None, facts.loaded_dtype):
        problem = f"is not what this session was read in: leave it out for {facts.loaded_dtype}"
        raise ConfigError(problem, option="dtype", value=dtype)
    from compresskv.models.load import load
    from compresskv.sessions.begin import opened
    from compresskv.sessions.file import read_session

    contents = read_session(path)
    own = model if is_typed("model") or not facts.model else facts.model
    with Bar() as bar:
        loaded, tokenizer = load(own, dtype=facts.loaded_dtype, device=device, on_progress=bar)
    return opened(path, contents, loaded, tokenizer)
