"""When a compiled step is used; nothing heavy is imported here."""

from compresskv.errors import ConfigError

NEVER, AUTO, ALWAYS = "never", "auto", "always"
MODES = (NEVER, AUTO, ALWAYS)


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ConfigError: naming the option and its value.
    """
    if mode not in MODES:
        raise ConfigError(f"must be one of {', '.join(MODES)}", option="compile", value=mode)
