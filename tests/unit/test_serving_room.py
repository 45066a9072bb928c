"""What eviction takes beside vLLM's memory: bounded, whatever a prompt's length, and without another choice."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_serving_pages import Side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskv.methods.streaming_llm import StreamingLLM
from compresskv.methods.vote import Vote
from compresskv.profiles.profile import Profile
from compresskv.serving import room
from compresskv.serving.choice import by_position, observe
from compresskv.serving.inputs import PagedInputs
from compresskv.serving.numbers import FP8
from compresskv.serving.pages import Pages, find_layout
from compresskv.serving.room import SCRATCH_NBYTES, WORK_NBYTES, LayerShape, max_observed_tokens, scratch_nbytes
from compresskv.serving.settings import EvictionSpec

BLOCK_SIZE, HEADS, GROUPS, DIM, WINDOW = 16, 4, 4, 32, 32


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, int] = {}
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        self.most = max(self.most, self._now)
        return output

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        memory = tensor.untyped_storage()
        pointer, nbytes = memory.data_ptr(), memory.nbytes()
        if pointer in given and pointer not in self._held:
            return  # a view of something from outside
        if pointer not in self._held:
            self._held[pointer] = 0
            self._now += nbytes
        self._held[pointer] += 1
        weakref.finalize(tensor, self._let_go, pointer, nbytes)

    def _let_go(self, pointer: int, nbytes: int) -> None:
        self._held[pointer] -= 1
        if not self._held[pointer]:
            del self._held[pointer]
            self._now -= nbytes


def make_layer(num_tokens: int, fp8: str | None = None) -> Any:
    """A layer of a request that has all blocks, in FlashAttention's order."""
    torch.manual_seed(0)
    cache = torch.randn(-(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, HEADS, 2 * DIM).transpose(1, 2)
    layer = SimpleNamespace(impl=Side(), kv_cache=cache, kv_cache_dtype="auto", num_kv_heads=HEADS, head_size=DIM)
    if fp8 is not None:
        layer.kv_cache, layer.kv_cache_dtype = cache.to(FP8[fp8]).view(torch.uint8), fp8
        layer.dtype, layer._k_scale_float, layer._v_scale_float = torch.float32, 0.5, 0.5
    return layer


@pytest.fixture(autouse=True)
def _slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_serving_pages.SLOTS", BLOCK_SIZE)


def make_inputs(layer: Any, num_tokens: int) -> Iterator[PagedInputs]:
    """As a worker looks at a layer."""
    pages = Pages(layer, find_layout(layer, BLOCK_SIZE))
    torch.manual_seed(7)
    queries = 3 * torch.randn(1, HEADS * GROUPS, WINDOW, DIM)
    itemsizes = (1, 4) if layer.kv_cache_dtype in FP8 else (4,)
    num_heads, piece = LayerShape(HEADS, GROUPS, DIM, *itemsizes).scored_at_once(num_tokens, WINDOW)
    for start in range(0, HEADS, num_heads):
        yield PagedInputs(
            pages,
            torch.arange(len(layer.kv_cache)),
            num_tokens,
            slice(start, start + num_heads),
            piece,
            layer_idx=0,
            query_window=queries[:, start * GROUPS : (start + num_heads) * GROUPS],
            scaling=DIM**-0.5,
            softcap=None,
            valid=None,
            first_head=start * GROUPS,
        )


def vote(**options: Any) -> Vote:
    """Of a model of one layer, in which all heads vote."""
    scores = (tuple(torch.linspace(0.1, 1, HEADS * GROUPS).tolist()),)
    profile = Profile(
        "one layer",
        SimpleNamespace(num_layers=1, num_query_heads=HEADS * GROUPS),
        (0,),
        scores,
        None,
        1,
        {"even": (1.0,)},
        (1.0,),
    )  # type: ignore[arg-type]
    return Vote(window_size=WINDOW, **options).with_profile(profile)  # type: ignore[return-value]


def _named(value: Any) -> str:
    return getattr(value, "label", str(value))


METHODS = [vote(), vote(local_weight=0, num_heads=9), StreamingLLM()]


@pytest.mark.parametrize(("method", "fp8"), [*zip(METHODS, [None] * 3, strict=True), (METHODS[0], "fp8")], ids=_named)
def test_scoring_stays_within_its_share(method: Any, fp8: str | None) -> None:
    """As the whole prompt's logits do not: these are 67 MB and more."""
    num_tokens = 33_000
    layer = make_layer(num_tokens, fp8)
    with Live() as live:
        found = observe(method, make_inputs(layer, num_tokens))
    assert found.scores is not None or found.vote is not None
    assert live.most < WORK_NBYTES
    assert num_tokens * HEADS * GROUPS * WINDOW * 4 > 2 * WORK_NBYTES


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("num_tokens", [700, 1500])
def test_little_memory_changes_no_score(num_tokens: int, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(num_tokens)
    whole = list(make_inputs(layer, num_tokens))
    assert [(one.num_kv_heads, one._piece) for one in whole] == [(HEADS, num_tokens)]
    expected = observe(method, whole)
    monkeypatch.setattr(room, "WORK_NBYTES", 1 << 20)
    pieces = list(make_inputs(layer, num_tokens))
    assert len(pieces) > 1
    assert pieces[0]._piece < num_tokens
    found = observe(method, pieces)
    torch.testing.assert_close(found.vote, expected.vote)
    torch.testing.assert_close(found.scores, expected.scores)


def test_moving_stays_within_its_share() -> None:
    num_tokens = 70_000
    layer = make_layer(num_tokens)
    pages = Pages(layer, find_layout(layer, BLOCK_SIZE))
    kept = torch.arange(1, num_tokens)
    at_once = LayerShape(HEADS, GROUPS, DIM, 4).moved_at_once()
    with Live() as live:
        pages.move(torch.arange(len(layer.kv_cache)), kept, torch.arange(len(layer.kv_cache)), at_once)
    assert live.most < WORK_NBYTES
    assert len(kept) * HEADS * DIM * 2 * 4 > 2 * WORK_NBYTES


def test_scratch_of_real_models() -> None:
    """An 8B model at 131,072 tokens: 32 layers, 8 KV heads of 128, which 4 query heads read each."""
    model = SimpleNamespace(max_model_len=131_072, get_total_num_hidden_layers=lambda: 32)
    assert scratch_nbytes(model) == SCRATCH_NBYTES == 64 << 20
    assert max_observed_tokens(model) == 131_072
    heads, piece = LayerShape(8, 4, 128, 2).scored_at_once(131_072, 32)
    assert heads >= 2
    assert piece >= 1024
    assert LayerShape(8, 4, 128, 2).scored_at_once(1024, 32) == (8, 1024)
    model.max_model_len = 1 << 20
    assert scratch_nbytes(model) == (32 << 20) + (1 << 20) * 32 * 8  # one such prompt's, and no more


@pytest.mark.parametrize(("num_kept", "kept"), [(1, [0]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 8, 9])])
def test_positions_alone(num_kept: int, kept: list[int]) -> None:
    assert by_position(EvictionSpec(10, 10, num_kept, 2), torch.device("cpu")).tolist() == kept
