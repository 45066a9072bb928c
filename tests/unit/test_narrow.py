"""Which float32 weights fit into 16 bits, and what becomes of their copies."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from compresskv.compiled import narrow
from compresskv.compiled.narrow import NarrowWeights, narrow_dtype, narrow_weights
from compresskv.system import memory

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@given(st.lists(st.floats(width=32), min_size=1, max_size=5), st.sampled_from([torch.float32, *SIXTEEN_BITS]))
def test_a_dtype_is_named_only_if_it_loses_nothing(numbers: list[float], checkpoint: torch.dtype) -> None:
    weight = torch.tensor(numbers).to(checkpoint).float()
    found = narrow_dtype(weight)
    if found is not None:
        assert torch.equal(weight.to(found).float().nan_to_num(1.5), weight.nan_to_num(1.5))
    elif not weight.isnan().any():
        assert not any(torch.equal(weight.to(dtype).float(), weight) for dtype in SIXTEEN_BITS)
        assert checkpoint == torch.float32


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_one_number_decides(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    assert narrow_dtype(weight) == dtype
    weight[-1, -1] = 1 + 2.0**-20
    assert narrow_dtype(weight) is None


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_copies_of_a_widened_checkpoint_hold_the_same_numbers(dtype: torch.dtype) -> None:
    model = tiny.build_model("llama").to(dtype).float()
    found = narrow_weights(model)
    assert narrow_weights(model) is found
    copies, own = found.copies(model), dict(model.named_parameters())
    assert len(copies) == 4 * 7 + 1  # all linear layers' and the output embedding's
    for name, copied in copies.items():
        assert copied.dtype == dtype
        assert torch.equal(copied.float(), own[name])


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "no memory"])
def test_models_that_have_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build_model("llama")
    if kind != "float32":
        model.bfloat16()
    if kind == "no memory":
        model.float()
        monkeypatch.setattr(memory, "available_nbytes", lambda _: 100)
    assert NarrowWeights(model).copies(model) == {}


def test_tied_weights_are_copied_once() -> None:
    model = tiny.build_model("llama").bfloat16().float()
    layers = model.model.layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    assert len(narrow_weights(model).dtypes) == 4 * 7


def written_to(weight: Tensor) -> None:
    weight[1, 2] += 1


def written_to_unseen(weight: Tensor) -> None:
    weight.data[1, 2] += 2.0**-9  # as adapters are merged: PyTorch counts no change


def swapped(weight: Tensor) -> None:
    weight.data = weight.data.clone()


@pytest.mark.parametrize("change", [written_to, written_to_unseen, swapped])
def test_changed_weights_are_noticed(change: Callable[[Tensor], None]) -> None:
    model = tiny.build_model("llama").bfloat16().float()
    found, copied = narrow_weights(model), copy.deepcopy(model)
    weight = model.model.layers[3].mlp.up_proj.weight
    with torch.no_grad():
        change(weight)
    assert not found.fits(model)
    assert narrow_weights(model) is not found
    assert narrow_weights(model).fits(model)
    assert narrow_weights(copied) is not found


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    narrow._known.clear()
    yield
    narrow._known.clear()
