"""What packing does to numbers: how far they may move, and that nothing else moves them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresskv.cache.stores.packed_states import PackedStates, turned, turned_back
from compresskv.cache.stores.packed_vectors import PackedVectors, rotation
from compresskv.errors import ModelError
from compresskv.selection.precision import PRECISIONS, RANGE_NBYTES

HEAD_DIMS = [8, 64, 80, 96, 112, 128, 256]


def vectors(seed: int, scale: float, offset: float, dim: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, generator=generator) * scale + offset


numbers = st.builds(
    vectors,
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 1e-4, -3.0, 2000.0]),
    dim=st.sampled_from(HEAD_DIMS),
)


@given(states=numbers, bits=st.sampled_from([8, 4]))
@settings(max_examples=60, deadline=None)
def test_every_number_comes_back_to_half_a_step(states: Tensor, bits: int) -> None:
    low, high = torch.aminmax(states, dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # float16 rounds the lowest number and the step, which is then too short by up to 1 in 2048 of the whole range
    rounding = (low.abs() + (high - low)) / 1024 + 2.0**-24 * 2**bits
    error = (PackedVectors.of(states, bits).unpacked() - states).abs()
    assert bool((error <= step / 2 + rounding).all())


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 300.0]), dim=st.sampled_from(HEAD_DIMS[1:]))
@settings(max_examples=30, deadline=None)
def test_two_bits_err_as_little_as_four_levels_can(seed: int, scale: float, dim: int) -> None:
    """On normally distributed numbers the best four levels err by 0.1175 of the variance (Max, 1960)."""
    states = vectors(seed, scale, 0.0, dim, count=50)
    values, keys = (PackedVectors.of(states, 2, are_keys=are_keys).unpacked() for are_keys in (False, True))
    variance = states.var(dim=-1, correction=0).sum()
    assert (values - states).square().mean(dim=-1).sum() < 0.13 * variance
    assert (keys - states).square().mean(dim=-1).sum() < 0.16 * variance
    torch.testing.assert_close((keys * states).sum(dim=-1), states.square().sum(dim=-1), rtol=4e-3, atol=0)


@given(states=numbers, bits=st.sampled_from([8, 4, 2]))
@settings(max_examples=30, deadline=None)
def test_a_vector_is_packed_as_it_is_alone(states: Tensor, bits: int) -> None:
    whole = PackedVectors.of(states, bits)
    one = PackedVectors.of(states[1, 3], bits)
    assert torch.equal(whole.codes[1, 3], one.codes)
    assert torch.equal(whole.ranges[1, 3], one.ranges)
    assert torch.equal(whole.unpacked()[1, 3], one.unpacked())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_code_comes_back_in_its_place(bits: int) -> None:
    codes = torch.arange(2**bits).flip(0).float()  # all of them, and none where its neighbour's would be right
    packed = PackedVectors.of(codes, bits)
    assert packed.codes.numel() == len(codes) * bits // 8
    assert torch.equal(packed.unpacked(), codes)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_numbers_beyond_float16_are_cut_off_and_stay_numbers(bits: int) -> None:
    states = torch.tensor([[1e38, -1e38, 0.0, 1.0]])
    unpacked = PackedVectors.of(states, bits).unpacked()
    assert bool(unpacked.isfinite().all())
    most = 6e4 if bits > 2 else 4e4  # the middle two take steps from the others
    assert unpacked[0, 0] > most
    assert unpacked[0, 1] < -most


def test_an_odd_number_of_channels_cannot_share_bytes() -> None:
    assert PackedVectors.of(torch.ones(2, 5), 8).unpacked().shape == (2, 5)
    with pytest.raises(ModelError, match="5 numbers, 4 bits need a multiple of 2"):
        PackedVectors.of(torch.ones(2, 5), 4)
    with pytest.raises(ModelError, match="6 numbers, 2 bits need a multiple of 4"):
        PackedVectors.of(torch.ones(2, 6), 2)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_rotation_keeps_products_and_spreads_an_outlier(dim: int) -> None:
    turns = rotation(dim, torch.device("cpu"))
    torch.testing.assert_close(turns @ turns.T, torch.eye(dim), atol=1e-5, rtol=0)
    states = torch.zeros(dim)
    states[dim // 2] = 16.0
    size = dim & -dim
    assert float(turned(states).abs().max()) == pytest.approx(16 / size**0.5)
    torch.testing.assert_close(turned_back(turned(states)), states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_what_all_tokens_share_costs_no_precision(dim: int) -> None:
    # Some models' keys have a bias a hundred times as large as what differs between tokens.
    generator = torch.Generator().manual_seed(dim)
    states = torch.randn(1, 40, dim, generator=generator) + 200 * torch.randn(dim, generator=generator)
    for are_keys in (False, True):
        (found,) = PackedStates.of([states], None, 4, are_keys=are_keys).heads(back=True)
        assert float((found - states).abs().mean()) < 0.15


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_turned_queries_see_what_queries_see_of_keys_as_they_were_given(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    parts = [torch.randn(2, count, dim, generator=generator) * (1 + torch.arange(dim)) for count in (9, 4)]
    keys = PackedStates.of(parts, None, 4, are_keys=True)
    query = torch.randn(2, 4, 1, dim, generator=generator)
    turned_query = keys.turned_queries(query)
    for head, (stored, as_given) in enumerate(zip(keys.heads(back=False), keys.heads(back=True), strict=True)):
        for own in (2 * head, 2 * head + 1):
            found = turned_query[:, own] @ stored.transpose(1, 2)
            torch.testing.assert_close(found, query[:, own] @ as_given.transpose(1, 2), rtol=1e-4, atol=1e-2)


def test_channels_that_never_vary_are_kept() -> None:
    states = torch.zeros(1, 6, 8)
    states[..., 3], states[..., 5] = 7.0, torch.arange(6.0)
    (found,) = PackedStates.of([states], None, 4, are_keys=True).heads(back=True)
    torch.testing.assert_close(found, states, atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["int8", "int4k8", "int4"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_bytes_of_a_token_are_those_of_its_codes_and_ranges(dim: int, name: str) -> None:
    precision = PRECISIONS[name]
    packed = [PackedVectors.of(torch.ones(1, dim), bits) for bits in (precision.key_bits, precision.value_bits) if bits]
    assert sum(one.codes.nbytes + one.ranges.nbytes for one in packed) == precision.nbytes(dim, 2)
    assert precision.nbytes(dim, 2) < PRECISIONS["native"].nbytes(dim, 2)
    assert packed[0].ranges.nbytes == RANGE_NBYTES
