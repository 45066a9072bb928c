"""Kernels in Triton's language, which is imported with this module.

Arguments have no types: Triton's compiler looks their names up where kernels may look nothing up.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def read_split(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    starts,
    ends,
    mixed_out,
    best_out,
    total_out,
    scaling,
    num_slots,
    num_groups,
    DIM: tl.constexpr,  # noqa: N803 - Triton's own convention
    ROWS: tl.constexpr,  # noqa: N803 - Triton's own convention
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's own convention
) -> None:
    """One split of one KV head's part, in one row of the batch: for all query heads that read it."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    start, end = tl.load(starts + head), tl.load(ends + head) + 1
    size = tl.cdiv(tl.cdiv(end - start, num_splits), BLOCK) * BLOCK
    first = start + split * size
    last = tl.minimum(first + size, end)
    group, dim, column = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
    heads = (row * num_heads + head) * num_groups + group
    queries = tl.load(query + heads[:, None] * DIM + dim[None, :], mask=(group < num_groups)[:, None], other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for at in range(first, last, BLOCK):
        own = at + column < last
        places = (row * num_slots + at + column)[:, None] * DIM + dim[None, :]
        block = tl.load(keys + places, mask=own[:, None], other=0.0)
        logits = tl.dot(queries, tl.trans(block), input_precision="ieee") * scaling
        logits = tl.where(own[None, :], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        weights, left = tl.exp(logits - higher[:, None]), tl.exp(best - higher)
        block = tl.load(values + places, mask=own[:, None], other=0.0)
        total = total * left + tl.sum(weights, 1)
        mixed = mixed * left[:, None] + tl.dot(weights.to(block.dtype), block, input_precision="ieee")
        best = higher
    place = ((row * num_heads + head) * num_splits + split) * ROWS + group
    tl.store(best_out + place, best)
    tl.store(total_out + place, total)
    tl.store(mixed_out + place[:, None] * DIM + dim[None, :], mixed)
