"""What to say after an unknown name."""

import difflib
from collections.abc import Sequence


def suggestion(word: object, known: Sequence[str]) -> str:
    """': did you mean ...?' where a known name comes near, and the whole list otherwise."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f": did you mean {by_lower[near[0]]!r}?" if near else f": choose from {', '.join(known)}"
