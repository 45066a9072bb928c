"""Many numbers as one short text: floats from the lowest byte on, in base64."""

import base64
import struct
from collections.abc import Sequence


def packed(numbers: Sequence[float], num_bits: int = 32) -> str:
    """Numbers as floats of 32 or 16 bits.

    Raises:
        OverflowError: a number is too large for 16.
    """
    return base64.b64encode(struct.pack(f"<{len(numbers)}{_CODES[num_bits]}", *numbers)).decode()


def unpacked(text: str, num_bits: int = 32) -> tuple[float, ...]:
    """What `packed` was given, as such floats.

    Raises:
        ValueError: it is nothing of that kind.
    """
    try:
        data = base64.b64decode(text, validate=True)
        return struct.unpack(f"<{len(data) * 8 // num_bits}{_CODES[num_bits]}", data)
    except (ValueError, struct.error):
        raise ValueError(f"holds what is not {num_bits}-bit floats in base64") from None


_CODES = {32: "f", 16: "e"}
