"""Sizes in bytes as they are typed: '3MB', '64 KiB', '1.5 gb'."""

import re

NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SIZE = re.compile(rf"{NUMBER}\s*(?:([kMG])(i?))?B", re.IGNORECASE)
_MOST_DIGITS = 100  # Python makes no numbers of some thousands
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


def find_nbytes(text: str) -> int | None:
    """Whole bytes: kB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024; case means nothing.

    None where it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or len(text) > _MOST_DIGITS:
        return None
    number, prefix, binary = found.groups()
    whole, _, part = number.partition(".")
    unit = (1024 if binary else 1000) ** _POWERS[(prefix or "").lower()]
    nbytes: int = int(whole + part) * unit // 10 ** len(part)
    return nbytes
