"""What computed a result."""

import platform

import torch
import transformers

from compresskv.version import __version__


def versions() -> dict[str, str]:
    """Of this package and what it rests on, as results name them."""
    return {
        "compresskv": __version__,
        "torch": str(torch.__version__),  # of a type of its own
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
