"""Tensors that grow in place, and never under the eyes of a branch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskv.cache.stores.base import ROOM
from compresskv.cache.stores.growing import Growing


def numbers(start: int, count: int) -> torch.Tensor:
    """(2, 3, count, 4), every token's numbers its own."""
    tokens = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return tokens + torch.arange(6.0).view(2, 3, 1, 1) * 1000 + torch.arange(4) / 8


@given(st.integers(1, 40), st.lists(st.integers(1, ROOM + 9), max_size=6))
def test_it_holds_what_concatenation_would(first: int, steps: list[int]) -> None:
    growing, expected, seen = Growing(numbers(0, first)), numbers(0, first), []
    for num_new in steps:
        new = numbers(expected.shape[2], num_new)
        expected = torch.cat([expected, new], dim=2)
        held = growing.append(new, ROOM)
        assert held is growing.held
        seen.append((held, expected))
    for held, wanted in seen:  # what was handed out earlier is as it was
        assert torch.equal(held, wanted)


def test_only_one_token_in_many_copies() -> None:
    growing = Growing(numbers(0, 100))
    places = [growing.append(numbers(100 + token, 1), ROOM).data_ptr() for token in range(ROOM + 2)]
    assert len(set(places)) == 2
    assert len(set(places[:-1])) == 1


def test_what_it_was_made_of_stays_as_it_was() -> None:
    held = numbers(0, 5)
    first, second = Growing(held), Growing(held)
    assert not torch.equal(first.append(numbers(5, 1), ROOM), second.append(numbers(9, 1), ROOM))
    assert torch.equal(held, numbers(0, 5))
