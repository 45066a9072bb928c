"""What computed a result."""

import platform

import torch
import transformers

from compresskv.version import __version__


def libraries() -> dict[str, str]:
    """Versions of this package, as it runs and not as it was installed, and of what it rests on."""
    return {
        "compresskv": __version__,
        "torch": str(torch.__version__),  # of a type of its own
        "transformers": transformers.__version__,
    }


def versions() -> dict[str, str]:
    """The same with Python's, as results name them."""
    return {**libraries(), "python": platform.python_version()}
