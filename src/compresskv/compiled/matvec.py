"""Products of one row, for the compiler to generate.

A decode step multiplies every weight matrix by one row. The CPU's matrix library reads weights at a third of the
memory's bandwidth then; of a product and a sum, Inductor makes a loop that is bound by the bandwidth alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import Arg, CallFunction, Match, PatternMatcherPass, register_graph_pattern

_aten = torch.ops.aten
_BYTES = 4


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
    """The (N, K) weight whose transpose a (K, N) factor is. int8 weights are also converted to the row's dtype."""
    node, transposed = matrix, False
    while True:
        if node.target is _aten.permute.default and node.args[1] == [1, 0]:
            transposed = not transposed
        elif node.target is not torch.ops.prims.convert_element_type.default or not _is_int8(node.args[0]):
            return node if transposed else None
        node = node.args[0]


def product(row: Tensor, weight: Tensor) -> Tensor:
    """`row` (1, K) times the transpose of `weight` (N, K), summed in float32: (1, N)."""
    if weight.dtype == torch.int8 and weight.shape[1] % _BYTES == 0:
        return _int8_product(row, weight)
    return (weight.float() * row.float()).sum(-1)[None]


def _is_int8(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype == torch.int8


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
