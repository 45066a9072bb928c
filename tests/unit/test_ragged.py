"""The store of KV heads that retain different numbers of tokens."""

import copy

import pytest
import torch
from torch import Tensor

from compresskv.cache.stores.base import ROOM
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.cache.stores.retain import retained
from compresskv.selection.select import EMPTY_SLOT

NUM_TOKENS = 12
# two rows, two heads; the first head holds 3 slots, the second 5
INDICES = torch.tensor([[[-1, -1, 0, 4, 11], [1, 2, 3, 9, 11]], [[-1, -1, -1, -1, 11], [-1, 5, 6, 7, 11]]])


def states(offset: float = 0.0, num_tokens: int = NUM_TOKENS) -> Tensor:
    """(2, 2, T, 1): every token's number, its head's times 100 and its row's times 1000."""
    rows, heads = torch.arange(2.0)[:, None, None] * 1000, torch.arange(2.0)[None, :, None] * 100
    return (rows + heads + torch.arange(num_tokens) + offset)[..., None]


def store() -> RaggedStore:
    source = DenseStore(states(), states(0.5))
    return RaggedStore.gathered(source, *source.held.choose(INDICES))


def keys(store: RaggedStore) -> list[Tensor]:
    return [keys for keys, _ in store.heads()]


def contents(store: RaggedStore) -> list[list[list[float]]]:
    values = [values for _, values in store.heads()]
    return [tensor.flatten(1).tolist() for tensor in (*keys(store), *values, *store.positions.split(1, dim=1))]


def test_each_head_holds_its_own_tokens_and_no_slot_more_than_its_fullest_row() -> None:
    ragged = store()
    assert [own.shape for own in keys(ragged)] == [(2, 1, 3, 1), (2, 1, 5, 1)]
    for head in range(2):
        for row in range(2):
            slots = INDICES[row, head, 5 - keys(ragged)[head].shape[2] :]
            assert torch.equal(ragged.positions[row, head, 5 - len(slots) :], slots)
            used = slots != EMPTY_SLOT
            kept = slots[used] + 1000.0 * row + 100 * head
            assert torch.equal(keys(ragged)[head][row, 0, used, 0], kept)
            assert torch.equal(ragged.heads()[head][1][row, 0, used, 0], kept + 0.5)


def test_no_head_keeps_the_prompt_or_another_head_alive() -> None:
    ragged = store()
    tensors = ragged.tensors
    assert [tensor.shape for tensor in tensors] == [(2, 3 + 5, 1)] * 2
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("indices", "fits"),
    [
        pytest.param(INDICES, True, id="heads_differ"),
        pytest.param(INDICES[:, 1:], False, id="one_choice_for_all_heads"),
        pytest.param(
            torch.tensor([[[EMPTY_SLOT, 1], [0, 1]], [[0, 1], [EMPTY_SLOT, 1]]]), False, id="rows_even_it_out"
        ),
        pytest.param(torch.tensor([[[0, 1], [2, 3]]] * 2), False, id="as_many_but_others"),
    ],
)
def test_only_heads_that_need_different_room_are_stored_apart(indices: Tensor, fits: bool) -> None:
    assert isinstance(retained(DenseStore(states(), states()), indices), RaggedStore) == fits


def test_new_tokens_go_to_the_end_of_every_head() -> None:
    ragged, new = store(), states(20.0, 2)
    ragged.append(new, new + 0.5)
    for head, count in enumerate((3, 5)):
        assert keys(ragged)[head].shape[2] == count + 2
        assert torch.equal(keys(ragged)[head][:, 0, count:], new[:, head])
        assert torch.equal(ragged.heads()[head][1][:, 0, count:], new[:, head] + 0.5)


def test_tokens_one_by_one_are_those_at_once_and_few_of_them_copy_anything() -> None:
    ragged, at_once, places = store(), store(), set()
    for token in range(ROOM):
        new = states(20.0 + token, 1)
        ragged.append(new, new + 0.5)
        places.add(ragged.tensors[0].data_ptr())
        at_once.append(new, new + 0.5) if token == 0 else None
    rest = torch.cat([states(20.0 + token, 1) for token in range(1, ROOM)], dim=2)
    at_once.append(rest, rest + 0.5)
    assert contents(ragged) == contents(at_once)
    assert len(places) == 1


def test_a_cropped_store_writes_nowhere_that_a_branch_reads() -> None:
    ragged = store()
    ragged.append(states(20.0, 2), states(20.5, 2))
    branch = copy.copy(ragged)
    before = contents(branch)
    ragged.crop(2)
    ragged.append(states(40.0, 2), states(40.5, 2))
    assert contents(branch) == before
    assert contents(ragged) != before


def test_rows_are_rearranged_with_their_positions() -> None:
    ragged = store()
    ragged.map_rows(lambda rows: rows[[1, 1, 0]])
    assert [rows[0] == rows[1] for rows in contents(ragged)] == [True] * 6
    assert [[rows[2], rows[0]] for rows in contents(ragged)] == contents(store())


def test_a_copy_that_goes_on_leaves_the_original_as_it_was() -> None:
    ragged = store()
    copied = copy.copy(ragged)
    assert all(a is b for a, b in zip(copied.tensors, ragged.tensors, strict=True)), "no copy before it is needed"
    copied.append(states(20.0, 2), states(20.5, 2))
    copied.crop(1)
    copied.map_rows(lambda rows: rows[[1, 0]])
    assert contents(ragged) == contents(store())
