"""Every store does what the naive one does, whatever is asked of it in whatever order."""

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskv import CacheStateError
from compresskv.attention.plain import PlainAttention
from compresskv.cache.stores import packed
from compresskv.cache.stores.base import EVEN, Store
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.packed import PackedStore
from compresskv.cache.stores.packed_kinds import Int2Store, Int4K8Store, Int4Store, Int8Store
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.cache.stores.retain import PACKED_STORES, STORES, retained
from compresskv.selection.precision import PRECISIONS
from compresskv.selection.select import EMPTY_SLOT
from reference_store import ReferenceStore

NUM_PROMPT, NUM_HEADS, GROUPS, DIM = 14, 2, 3, 4
MODULE = nn.Module()
KINDS: list[type[Store]] = [*STORES, *PACKED_STORES.values()]
EXACT = (0.0, 0.0)
ERRORS: dict[type[Store], tuple[float, float]] = {
    Int8Store: (0.02, 0.02),
    Int4K8Store: (0.02, 0.7),
    Int4Store: (0.7, 0.7),
    Int2Store: (8.0, 4.0),
}
"""What packing may do to a number of a key and of a value here: they lie within -4 and 4, by four to a vector. In two
bits that says next to nothing: what those come to is tested with the rounding store."""


@pytest.fixture(autouse=True)
def _short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """Plain, by hand: (B, T, H_q, D); without a mask, causal."""
    keys, values = (states.repeat_interleave(query.shape[1] // keys.shape[1], dim=1) for states in (keys, values))
    logits = query @ keys.transpose(2, 3)
    if mask is None:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - query.shape[2])
    logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(dim=-1) @ values).transpose(1, 2), None


class Run:
    """A store and the naive one, to which the same is done."""

    def __init__(self, kind: type[Store], seed: int, batch_size: int = 2) -> None:
        self.kind, self.random = kind, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        whole = DenseStore(*self.states(NUM_PROMPT, batch_size))
        self.reference = ReferenceStore.of(whole)
        self.store: Store = whole
        self.retain()

    def states(self, num_tokens: int, batch_size: int) -> tuple[Tensor, Tensor]:
        shape = (batch_size, NUM_HEADS, num_tokens, DIM)
        return torch.randn(shape, generator=self.generator), torch.randn(shape, generator=self.generator)

    def retain(self) -> None:
        """Some of what every head holds: of the dense store, as many in the fullest row of each head."""
        shared = self.kind is DenseStore and self.random.random() < 0.5
        chosen: list[list[list[int]]] = []
        fewest = 0 if issubclass(self.kind, PackedStore) and self.random.random() < 0.3 else 1
        counts = [self.random.randint(2 * fewest, 5) for _ in range(NUM_HEADS)]
        counts[0] = max(1, counts[0])
        for row, heads in enumerate(self.reference.entries):
            held = [[entry[0] for entry in entries] for entries in heads]
            if shared:
                common = [token for token in held[0] if all(token in own for own in held)]
                held = [common or held[0][-1:]]
                if not common:
                    return
            chosen.append([])
            for own, count in zip(held, counts, strict=False):
                most = counts[0] if self.kind is DenseStore else count
                keeps = most if row == 0 else self.random.randint(min(fewest, most), most)
                chosen[-1].append(sorted(self.random.sample(own, min(keeps, len(own)))))
        fullest = max(len(own) for heads in chosen for own in heads)
        if self.kind is DenseStore and any(len(own) < fullest for own in chosen[0]):
            return  # heads that differ are the ragged store's
        tokens = torch.tensor([[[EMPTY_SLOT] * (fullest - len(own)) + own for own in heads] for heads in chosen])
        held, slots = self.store.held.choose(tokens)
        self.store = self.kind.gathered(self.store, held, slots)
        self.reference = self.reference.retained(tokens)

    def append(self) -> None:
        new = self.states(self.random.choice([1, 1, 1, 3]), len(self.reference.entries))
        for store in (self.store, self.reference):
            store.append(*new)

    def crop(self) -> None:
        removed = self.random.randint(0, len(self.reference.held.later))
        for store in (self.store, self.reference):
            store.crop(removed)

    def map_rows(self) -> None:
        num_rows = len(self.reference.entries)
        rows = [self.random.randrange(num_rows) for _ in range(self.random.randint(1, 3))]
        for store in (self.store, self.reference):
            store.map_rows(lambda tensor: tensor[rows])

    def branch(self) -> None:
        """Go on with a copy; what happens to the original afterwards must not reach it, nor the other way round."""
        original, before = self.store, contents(self.store)
        self.store = copy.copy(original)
        self.append()
        assert contents(original) == before
        left = self.states(2, len(self.reference.entries))
        original.append(*left)
        original.crop(1)

    def save(self) -> None:
        self.store = type(self.store).from_state({name: value.clone() for name, value in self.store.state().items()})

    def check(self) -> None:
        own = ReferenceStore.of(self.store)
        assert_near(contents(self.store), contents(self.reference), *ERRORS.get(self.kind, EXACT))
        assert contents(self.store) == contents(own)
        assert self.store.held.num_seen == self.reference.held.num_seen
        assert self.store.held.floor == self.reference.held.floor
        num_new = len(self.reference.held.later) or 1
        query = torch.randn(len(self.reference.entries), NUM_HEADS * GROUPS, num_new, DIM, generator=self.generator)
        padding = torch.ones(len(query), 1, num_new, self.reference.held.num_seen, dtype=torch.bool)
        padding = padding.tril(self.reference.held.num_seen - num_new)
        if not len(self.reference.held.later):
            return  # a query comes with its own key
        padding[:, :, :, : self.random.choice([0, 3])] = False
        for mask in (None, padding):
            found = self.store.attend(PlainAttention(attention, 1.0), MODULE, query, mask)[0]
            expected = own.attend(attention, MODULE, query, mask)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def assert_near(found: Any, expected: Any, key_error: float, value_error: float) -> None:
    """The same tokens, with keys and values that differ by no more."""
    for found_rows, expected_rows in zip(found, expected, strict=True):
        for found_head, expected_head in zip(found_rows, expected_rows, strict=True):
            assert [entry[0] for entry in found_head] == [entry[0] for entry in expected_head]
            for (_, *own), (_, *wanted) in zip(found_head, expected_head, strict=True):
                assert own[0] == pytest.approx(wanted[0], rel=0, abs=key_error)
                assert own[1] == pytest.approx(wanted[1], rel=0, abs=value_error)


def contents(store: Store) -> Any:
    entries = store.entries if isinstance(store, ReferenceStore) else ReferenceStore.of(store).entries
    return [
        [[(position, key.tolist(), value.tolist()) for position, key, value in held] for held in heads]
        for heads in entries
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_operations(kind: type[Store], seed: int) -> None:
    run = Run(kind, seed)
    run.check()
    for _ in range(14):
        getattr(run, run.random.choice(["append", "append", "crop", "map_rows", "branch", "save", "retain"]))()
        run.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_other_code_writes(kind: type[Store]) -> None:
    run = Run(kind, seed=1, batch_size=1)
    for _ in range(8):
        keys, values = new = run.states(1, 1)
        slots = run.store.reserve()
        for held, states in zip((slots.keys, slots.values), (keys, values), strict=True):
            held.view(-1, DIM)[slots.ends] = states[0, :, 0]
        ends = list(slots.packed[-1].diff()) if slots.packed else [0] * NUM_HEADS
        own = zip(slots.starts, slots.ends, ends, strict=True)
        assert [end - start + num_packed for start, end, num_packed in own] == run.store.counts
        assert (slots.keys.ndim == 4) == (run.store.layout == EVEN or bool(slots.packed))
        run.store.advance()
        run.reference.append(*new)
        run.check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_evicted_or_never_read_cannot_be_retained(kind: type[Store]) -> None:
    whole = DenseStore(*Run(kind, seed=2).states(NUM_PROMPT, 2))
    with pytest.raises(CacheStateError, match="evicted before, or not read yet"):
        retained(whole, torch.tensor([[[0, NUM_PROMPT]]] * 2))
    cut = kind.gathered(whole, *whole.held.choose(torch.tensor([[[1, 4, 5], [1, 4, 9]]] * 2)))
    for wrong in ([[0, 1], [1, 4]], [[1, 4], [4, 5]], [[4, NUM_PROMPT], [4, 9]]):
        with pytest.raises(CacheStateError, match="evicted before, or not read yet"):
            retained(cut, torch.tensor([wrong] * 2))
    assert retained(cut, torch.tensor([[[4]]] * 2)).positions.tolist() == [[[4]]] * 2


def test_the_store_that_wastes_nothing_is_taken() -> None:
    whole = DenseStore(*Run(DenseStore, seed=3).states(NUM_PROMPT, 1))
    ragged = retained(whole, torch.tensor([[[EMPTY_SLOT, EMPTY_SLOT, 3], [0, 3, 4]]]))
    assert type(ragged) is RaggedStore
    even = retained(ragged, torch.tensor([[[3], [4]]]))
    assert type(even) is DenseStore
    slots = 2 * NUM_HEADS * DIM * torch.float32.itemsize
    assert (whole.nbytes, ragged.nbytes, even.nbytes) == (NUM_PROMPT * slots, 2 * slots, slots)


@pytest.mark.parametrize("kind", PACKED_STORES.values())
def test_what_is_packed_is_never_packed_again(kind: type[Store]) -> None:
    whole = DenseStore(*Run(kind, seed=4).states(NUM_PROMPT, 1))
    store = kind.gathered(whole, *whole.held.choose(torch.arange(NUM_PROMPT).expand(1, NUM_HEADS, -1)))
    before = contents(store)
    for step in range(3):
        tokens = store.positions[..., step:].expand(-1, NUM_HEADS, -1)
        store = kind.gathered(store, *store.held.choose(tokens))
        assert contents(store) == [[held[step:] for held in heads] for heads in before]
        before = contents(store)


@pytest.mark.parametrize("kind", PACKED_STORES.values())
def test_the_first_token_of_every_row_is_as_it_was_given(kind: type[Store]) -> None:
    whole = DenseStore(*Run(kind, seed=5).states(NUM_PROMPT, 2))
    tokens = torch.tensor([[[1, 4, 5], [2, 4, 9]], [[EMPTY_SLOT, EMPTY_SLOT, 7], [EMPTY_SLOT, 3, 8]]])
    store = kind.gathered(whole, *whole.held.choose(tokens))
    expected = contents(ReferenceStore.of(whole).retained(tokens))
    found = contents(store)
    assert [[held[0] for held in heads] for heads in found] == [[held[0] for held in heads] for heads in expected]
    later = kind.gathered(store, *store.held.choose(tokens[..., 1:]))
    whole_now = contents(later)[0]
    assert [held[0] for held in whole_now] == [held[1] for held in found[0]]


@pytest.mark.parametrize("kind", PACKED_STORES.values())
def test_a_state_of_before_the_first_token_was_left_whole_is_read_as_it_was(kind: type[PackedStore]) -> None:
    whole = DenseStore(*Run(kind, seed=6).states(NUM_PROMPT, 2))
    tokens = torch.tensor([[[1, 4, 5], [2, 4, 9]], [[EMPTY_SLOT, EMPTY_SLOT, 7], [EMPTY_SLOT, 3, 8]]])
    held, slots = whole.held.choose(tokens)
    store = kind.gathered(whole, replace(held, fewest=0), slots)
    state = store.state()
    assert not state.pop("whole")
    assert state["packed"].tolist() == [3, 3]
    read = kind.from_state(state)
    assert contents(read) == contents(store)
    later = kind.gathered(read, *read.held.choose(tokens[..., 1:]))
    assert later.state()["whole"]
    assert contents(later) == contents(ReferenceStore.of(read).retained(tokens[..., 1:]))


@pytest.mark.parametrize("kind", PACKED_STORES.values())
def test_where_a_row_of_a_head_holds_nothing_all_tokens_are_packed(kind: type[PackedStore]) -> None:
    whole = DenseStore(*Run(kind, seed=7).states(NUM_PROMPT, 2))
    none = EMPTY_SLOT
    for tokens in ([[[1, 4], [none, none]], [[3, 5], [none, 6]]], [[[1, 4], [none, none]], [[none, 5], [none, none]]]):
        store = kind.gathered(whole, *whole.held.choose(torch.tensor(tokens)))
        assert not store.state()["whole"]
        found = [[[entry[0] for entry in held] for held in heads] for heads in contents(store)]
        assert found == [[[token for token in held if token != none] for held in heads] for heads in tokens]


@pytest.mark.parametrize("name", PACKED_STORES)
def test_bytes_are_those_of_codes_ranges_means_the_first_token_and_the_tail(name: str) -> None:
    precision, num_heads, dim = PRECISIONS[name], 3, 64
    whole = DenseStore(*(torch.randn(1, num_heads, 200, dim).bfloat16() for _ in range(2)))
    store = retained(whole, torch.arange(100).expand(1, 1, -1), precision)
    fixed = 2 * dim * {"int8": 0, "int4k8": 1, "int4": 3, "int2": 3}[name] + 4 * dim - precision.nbytes(dim, 2)
    assert precision.fixed_nbytes(dim, 2) == fixed
    assert store.nbytes == num_heads * (100 * precision.nbytes(dim, 2) + fixed)
    new = torch.randn(1, num_heads, 1, dim).bfloat16()
    for _ in range(packed.TAIL):
        store.append(new, new, room=0)
    assert store.nbytes == num_heads * (100 * precision.nbytes(dim, 2) + fixed + packed.TAIL * 4 * dim)
    store.append(new, new, room=0)
    num_packed = 100 + packed.TAIL
    assert store.nbytes == num_heads * (num_packed * precision.nbytes(dim, 2) + fixed + 4 * dim)
    assert copy.copy(store).nbytes == store.nbytes
