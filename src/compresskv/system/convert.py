"""JSON's values as our own types; what does not fit is told in plain words."""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from compresskv.errors import CompressKVError

T = TypeVar("T")

Text = Annotated[str, msgspec.Meta(pattern=r"\S")]
"""A text that says something."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
"""How many of something there are: no tensor has more numbers."""
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
"""How much of something there is: no NaN, and nothing infinite."""
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
_MISFIT = re.compile(r"Expected `([^`]+)`, got `([^`]+)`$")
_EMPTY = (r"matching regex '\\S'", "of length >= 1")
_BOUND = re.compile(r"Expected `([^`]+)` ([<>].*)$")
_NAME = re.compile(r"Object (missing required|contains unknown) field `([^`]+)`$")


def convert(value: Any, kind: type[T]) -> T:
    """`value`, as `json.loads` gives it, as a dataclass, a Struct, a TypedDict.

    Raises:
        ValueError: it is none; the message names the field.
        CompressKVError: what the type says of itself in `__post_init__`.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, CompressKVError):
            raise error.__cause__ from None
        raise ValueError(_told(str(error))) from None


def _told(message: str) -> str:
    """msgspec's message as we say it."""
    problem, _, place = message.partition(" - at ")
    field = place.removeprefix("`key` in ").strip("`").removeprefix("$").removeprefix(".")
    if name := _NAME.match(problem):
        field = f"{field}.{name[2]}" if field else name[2]
        problem = "is missing" if name[1].startswith("missing") else "is unknown"
    elif misfit := _MISFIT.match(problem):
        problem = f"is {_in_words(misfit[2])}, not {_in_words(misfit[1])}"
    elif problem.endswith(_EMPTY):
        problem = "is empty"
    elif bound := _BOUND.match(problem):
        problem = f"is not {_in_words(bound[1])} {bound[2]}"
    else:
        problem = f"cannot be used ({problem.replace('`', '')})"
    return f"field {field!r} {problem}" if field else f"it {problem}"


def _in_words(kinds: str) -> str:
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds.split(" | "))
