"""Making and writing a figure. It needs matplotlib (`pip install compresskv[plot]`)."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv.errors import ConfigError
from compresskv.system.files import make_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which the colour-blind can tell apart, without their yellow: too pale for lines on white."""
MARKERS = "os^DvPX<>"
"""Another number of them than of colours: a colour that comes back has another marker."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'compresskv[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the ending of `path` is its format.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        make_folder(path.parent)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:].lower() or None, dpi=150)
        write_whole(path, drawn.getvalue())
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write the figure {str(path)!r}: {reason}") from error
