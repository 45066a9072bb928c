"""Attention of one token over packed keys and values, as one operation: what it is, and in which C++ it is compiled."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskv.cache.stores.packed_states import PackedStates
from compresskv.cache.stores.packed_vectors import PackedVectors
from compresskv.models.shape import Heads
from compresskv.selection.precision import Precision

SOURCES = tuple(Path(__file__).with_name(name) for name in ("packed_rows.cpp", "packed_attention.cpp"))
_DECLARED = (
    '__attribute__((visibility("hidden"))) AOTITorchError '  # other programs in this process have their own
    "aoti_torch_cpu_packed_attention({tensors}, double, AtenTensorHandle*)"
)


@torch.library.custom_op("compresskv::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    key_centre: Tensor | None,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_ranges: Tensor,
    value_centre: Tensor | None,
    rotation: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    bounds: Tensor,
    tail_end: Tensor,
    scaling: float,
) -> Tensor:
    """One token's attention to what each KV head holds packed and to a tail of first and new tokens.

    This is what a step does that is not compiled, and what the C++ is checked against.

    Args:
        query: (1, H_q, 1, D) float32.
        key_codes, key_ranges, key_centre, key_scale: of the keys, as in `PackedStates`.
        value_codes, value_ranges, value_centre: of the values.
        rotation: (D, D), as what is in 4 or 2 bits is turned.
        tail_keys, tail_values: (1, H_kv, T, D) float32.
        bounds: (H_kv + 1,) int64: where each KV head's part begins in what is packed, and the last one ends.
        tail_end: (1,) int64: the tail's last token.
        scaling: factor on the dot products.
    Returns: (1, 1, H_q, D) float32.
    """
    counts, (last,) = bounds.diff().tolist(), tail_end.tolist()
    dim, num_heads = query.shape[-1], len(counts)
    keys, values = (
        PackedStates(PackedVectors(codes, ranges, 8 * codes.shape[-1] // dim), counts, centre, scale)
        for codes, ranges, centre, scale in (
            (key_codes, key_ranges, key_centre, key_scale),
            (value_codes, value_ranges, value_centre, None),
        )
    )
    heads = zip(keys.heads(back=True), values.heads(back=True), strict=True)
    outputs = []
    for head, packed in enumerate(heads):
        held, weighted = (
            torch.cat([own[0], tail[0, head, : last + 1]])
            for own, tail in zip(packed, (tail_keys, tail_values), strict=True)
        )
        own_query = query.unflatten(1, (num_heads, -1))[0, head, :, 0]
        outputs.append((own_query @ held.T * scaling).softmax(dim=-1) @ weighted)
    return torch.cat(outputs)[None, None]


@packed_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(1, 1, query.shape[1], query.shape[3])


def is_compiled_here(heads: Heads, precision: Precision) -> bool:
    """Whether the C++ is for such a layer and for this system's compiler: it wants vectors as GCC and Clang have them,
    and rows of whole words of 32 bits.
    """
    bits = [own for own in (precision.key_bits, precision.value_bits) if own is not None]
    return sys.platform != "win32" and all(heads.head_dim * own % 32 == 0 for own in bits)


def definition(layers: Iterable[tuple[Heads, Precision]]) -> str:
    """For PyTorch's compiler: the C function of the operation, for such layers.

    It asks for a declaration, which it writes in front of what it generates, between `extern "C" {` and `}`. The
    definition goes with it, so that no library has to be built, found and loaded beside the program.
    """
    shapes = {
        (precision.key_bits, precision.value_bits, heads.head_dim, heads.num_query_heads // heads.num_kv_heads)
        for heads, precision in layers
    }
    cases = " ".join(f"CASE({', '.join(map(str, shape))})" for shape in sorted(shapes))
    tensors = ["AtenTensorHandle*" if "Optional" in str(one.type) else "AtenTensorHandle" for one in _tensors()]
    declared = _DECLARED.format(tensors=", ".join(tensors))
    text = "\n".join(one.read_text(encoding="utf-8") for one in SOURCES)
    return f'{declared};\n}}\n#define SHAPES(CASE) {cases}\n{text}\nextern "C" {{\nextern {declared}'


def _tensors() -> list[Any]:
    """The operation's arguments that are tensors."""
    schema = torch.ops.compresskv.packed_attention.default._schema
    return [one for one in schema.arguments if "Tensor" in str(one.type)]
