"""Products of one row as the compiler makes them, beside exact ones."""

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import linear

from compresskv.compiled.matvec import OneRowProducts, product, whole_loads


def error(found: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_weights(num_outputs: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-128, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("num_inputs", [64, 66])  # 66: rows that are no whole number of int32
def test_int8(num_inputs: int) -> None:
    row, weight = numbers(1, num_inputs), int8_weights(40, num_inputs)
    assert error(product(row, weight), row.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("bias", [None, numbers(40, seed=3)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("weight", [numbers(40, 64, seed=2), int8_weights(40, 64)], ids=["float", "int8"])
def test_compiled(weight: Tensor, dtype: torch.dtype, most: float, bias: Tensor | None) -> None:
    torch._dynamo.reset()
    if weight.dtype != torch.int8:
        weight = weight.to(dtype)
    row, own_bias = numbers(1, 64).to(dtype), None if bias is None else bias.to(dtype)
    passes = Counting()
    compiled = torch.compile(
        lambda row, weight, bias: linear(row * 2, weight.to(row.dtype), bias),
        options={"post_grad_custom_pre_pass": passes},
    )
    expected = linear(row.double() * 2, weight.double(), None if own_bias is None else own_bias.double())
    assert error(compiled(row, weight, own_bias), expected) < most
    assert passes.left == [False]  # no product is left to the matrix library


@pytest.mark.parametrize("num_outputs", [40, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_widened_in_the_loop(dtype: torch.dtype, num_outputs: int) -> None:
    torch._dynamo.reset()
    row, weight = numbers(1, 66), numbers(num_outputs, 66, seed=2).to(dtype)
    passes = Counting()
    compiled = torch.compile(
        lambda row, weight: linear(row, weight.float()), options={"post_grad_custom_pre_pass": passes}
    )
    assert error(compiled(row, weight), row.double() @ weight.double().T) < 1e-6
    assert passes.left == [False]


@pytest.mark.parametrize("num_inputs", [256, 268])  # 64 words of four bytes are whole vectors, 67 are not
@pytest.mark.parametrize("bits", [None, 256])
def test_whole_vectors_of_int8_are_loaded_from_where_they_lie(num_inputs: int, bits: int | None) -> None:
    torch._dynamo.reset()
    row, weight = numbers(1, num_inputs), int8_weights(40, num_inputs)
    if bits is not None and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2")
    compiled = torch.compile(
        lambda row, weight: linear(row, weight.to(row.dtype)),
        options={"post_grad_custom_pre_pass": Counting(), "cpp.simdlen": bits},
    )
    with whole_loads():
        found, (code, *_) = run_and_get_code(compiled, row, weight)
    assert error(found, row.double() @ weight.double().T) < 1e-6
    loads = [line for line in code.splitlines() if "Vectorized<int32_t>::loadu(" in line]
    counted = [line for line in loads if re.search(r", static_cast<int64_t>\(\d+L?\)\)", line)]
    assert loads
    assert len(counted) == (num_inputs == 268)  # the last vector of a row alone


def test_several_rows_are_left_to_the_matrix_library() -> None:
    torch._dynamo.reset()
    passes = Counting()
    rows, weight = numbers(3, 64), numbers(40, 64, seed=2)
    found = torch.compile(linear, options={"post_grad_custom_pre_pass": passes})(rows, weight)
    assert error(found, rows.double() @ weight.double().T) < 1e-6
    assert passes.left == [True]


class Counting(OneRowProducts):
    """Notes whether a graph has matrix products left."""

    def __init__(self) -> None:
        self.left: list[bool] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        self.left.append(any("mm" in str(node.target) for node in graph.nodes))

    def uuid(self) -> None:
        """None: nothing that was compiled before is used, so that the pass runs."""
