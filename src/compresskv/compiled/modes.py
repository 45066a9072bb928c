"""When a compiled step is used; nothing heavy is imported here."""

from compresskv.system.check import check_known

NEVER, AUTO, ALWAYS = "never", "auto", "always"
MODES = (NEVER, AUTO, ALWAYS)


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ConfigError: naming the option and its value.
    """
    check_known("compile", mode, MODES)
