"""Products of one row, for the compiler to generate.

A decode step multiplies every weight matrix by one row. The CPU's matrix library reads weights at a third of the
memory's bandwidth then; of a product and a sum, Inductor makes a loop that is bound by the bandwidth alone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.codegen.cpp import CppVecKernel
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import Arg, CallFunction, Match, PatternMatcherPass, register_graph_pattern

_aten = torch.ops.aten
_BYTES = 4
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class OneRowProducts(CustomGraphPass):
    """Rewrites matrix products of one row, (1, K) by (K, N), as sums in float32 over the weight's rows."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite all of a graph's."""
        _patterns.apply(graph)

    def uuid(self) -> Any:
        """What makes code that was cached for another version of this file invalid."""
        return get_hash_for_files((str(Path(__file__)),))


def _fits(match: Match) -> bool:
    """Whether it is a product of one row by a weight that is stored as a linear layer stores it."""
    *_, row, matrix = match.args
    return bool(row.meta["val"].shape[0] == 1) and _weight_of(matrix) is not None


_patterns = PatternMatcherPass()


@register_graph_pattern(CallFunction(_aten.mm.default, Arg(), Arg()), extra_check=_fits, pass_dict=_patterns)
def _replace_product(match: Match, row: fx.Node, matrix: fx.Node) -> None:
    match.replace_by_example(lambda row, weight: product(row, weight).to(row.dtype), [row, _weight_of(matrix)])


@register_graph_pattern(CallFunction(_aten.addmm.default, Arg(), Arg(), Arg()), extra_check=_fits, pass_dict=_patterns)
def _replace_product_with_bias(match: Match, bias: fx.Node, row: fx.Node, matrix: fx.Node) -> None:
    def with_bias(bias: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        return (product(row, weight) + bias).to(row.dtype)

    match.replace_by_example(with_bias, [bias, row, _weight_of(matrix)])


def _weight_of(matrix: Any) -> fx.Node | None:
    """The (N, K) weight whose transpose a (K, N) factor is, as it is stored: it may have been widened before."""
    node, transposed = matrix, False
    while True:
        if node.target is _aten.permute.default and node.args[1] == [1, 0]:
            transposed = not transposed
        elif node.target is not torch.ops.prims.convert_element_type.default or not _widens(node):
            return node if transposed else None
        node = node.args[0]


def product(row: Tensor, weight: Tensor) -> Tensor:
    """`row` (1, K) times the transpose of `weight` (N, K), summed in float32: (1, N)."""
    if weight.dtype == torch.int8 and weight.shape[1] % _BYTES == 0:
        return _int8_product(row, weight)
    return (weight.float() * row.float()).sum(-1)[None]


def _widens(node: fx.Node) -> bool:
    """Whether a conversion loses nothing that the sum in float32 would have: of int8, and of 16 bits to float32."""
    before: Any = node.args[0]
    stored = before.meta["val"].dtype
    return stored == torch.int8 or (node.meta["val"].dtype == torch.float32 and stored in _SIXTEEN_BITS)


def _int8_product(row: Tensor, weight: Tensor) -> Tensor:
    """The same; Inductor converts int8 vectors slowly, so four at a time are read as one int32 and shifted apart."""
    num_words = weight.shape[1] // _BYTES
    words = weight.view(torch.int32)
    parts = row.float().view(num_words, _BYTES).t().contiguous()
    # Without this, the compiler would gather the row's values anew for each row of the weight.
    parts = parts.as_strided((_BYTES, num_words), (num_words, 1))
    terms = [((words << 8 * (_BYTES - 1 - byte)) >> 8 * (_BYTES - 1)).float() * parts[byte] for byte in range(_BYTES)]
    total: Tensor = sum(terms[1:], terms[0])
    return total.sum(-1)[None]


@contextlib.contextmanager
def whole_loads() -> Iterator[None]:
    """Let Inductor load full vectors of int32 from where they lie.

    For AVX2, PyTorch's counted load copies them to the stack first, in two halves. The processor then waits until both
    have got to the cache: the int8 product takes ten times as long. It is meant for the last, shorter vector of a row.
    """
    kernel: Any = CppVecKernel
    counted = kernel._get_vec_load_line

    def load_line(self: Any, var: str, index: Any, dtype: torch.dtype, load_mask: Any = None) -> str:
        line: str = counted(self, var, index, dtype, load_mask)
        if dtype != torch.int32 or load_mask is not None or self.num_elems != self.vec_isa.nelements():
            return line
        return line.removesuffix(f", {cexpr_index(self.num_elems)})") + ")"

    kernel._get_vec_load_line = load_line
    try:
        yield
    finally:
        kernel._get_vec_load_line = counted
