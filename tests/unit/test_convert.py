"""JSON's values as our types: what does not fit is told without a word of Python or msgspec."""

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pytest

from compresskv.errors import ConfigError
from compresskv.system.convert import Text, convert


@dataclass(frozen=True)
class Inner:
    count: Annotated[int, msgspec.Meta(ge=1)]


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    inner: Inner
    rows: tuple[tuple[float, ...], ...] = ()
    by_name: dict[str, float] = msgspec.field(default_factory=dict)
    either: int | float | None = None
    title: Text = "a"
    words: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["a"])

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ConfigError("cannot work", option="name", value=self.name)


FITTING: dict[str, Any] = {"name": "a", "inner": {"count": 1}}


def test_what_fits_is_taken() -> None:
    made = convert({**FITTING, "rows": [[1, 2.5]], "either": 3}, Outer)
    assert made == Outer("a", Inner(1), ((1.0, 2.5),), {}, 3)
    assert type(made.rows[0][0]) is float
    assert type(made.either) is int


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({**FITTING, "name": 3}, "field 'name' is a whole number, not text"),
        ({**FITTING, "inner": {"count": True}}, "field 'inner.count' is true or false, not a whole number"),
        ({**FITTING, "inner": {"count": 0}}, "field 'inner.count' is not a whole number >= 1"),
        ({**FITTING, "inner": {}}, "field 'inner.count' is missing"),
        ({**FITTING, "rows": [[1.0, "x"]]}, "field 'rows[0][1]' is text, not a number"),
        ({**FITTING, "rows": {}}, "field 'rows' is an object, not a list"),
        ({**FITTING, "rows": [[10**400]]}, "field 'rows[0][0]' cannot be used (Number out of range)"),
        ({**FITTING, "by_name": {"x": None}}, "field 'by_name[...]' is null, not a number"),
        ({**FITTING, "by_name": {3: 1.0}}, "field 'by_name' is a whole number, not text"),
        ({**FITTING, "either": "x"}, "field 'either' is text, not a whole number or a number or null"),
        ({**FITTING, "title": " "}, "field 'title' is empty"),
        ({**FITTING, "words": []}, "field 'words' is empty"),
        ({**FITTING, "more": 1}, "field 'more' is unknown"),
        ({}, "field 'name' is missing"),
        ([], "it is a list, not an object"),
        (None, "it is null, not an object"),
    ],
)
def test_what_does_not_fit_is_told(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"^(field|it) ") as caught:
        convert(value, Outer)
    assert str(caught.value) == told


def test_what_a_type_says_of_itself_comes_through() -> None:
    with pytest.raises(ConfigError) as caught:
        convert({**FITTING, "name": "bad"}, Outer)
    assert (caught.value.option, caught.value.value) == ("name", "bad")
