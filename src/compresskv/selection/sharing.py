"""How layers share a budget."""

import math
from collections.abc import Sequence


def uniform(budget: int, num_layers: int, num_tokens: int) -> list[int]:
    """The same number for every layer, at most the prompt's."""
    return [min(budget, num_tokens)] * num_layers


def pyramid(budget: int, num_layers: int, num_tokens: int, *, window_size: int, beta: float) -> list[int]:
    """Linear from the first layer (most) to the last (least).

    The last layer keeps (b - W) / beta tokens beside its window, the first 2 (b - W) minus that.
    Where the first layer would exceed the prompt, it keeps the prompt and the last layer more.

    Source: PyramidKV (arXiv 2406.02069), section 4.2. Differs: the sum is exact (largest remainders), where the
    published code rounds the step down and loses tokens.
    """
    budget = min(budget, num_tokens)
    spare = budget - window_size
    if spare <= 0 or num_layers == 1:
        return [budget] * num_layers
    first = min(2 * spare - spare / beta, num_tokens - window_size)
    step = (2 * first - 2 * spare) / (num_layers - 1)
    shares = [first - layer * step for layer in range(num_layers)]
    return [window_size + count for count in _round_to_sum(shares, spare * num_layers)]


def error_aware(
    budget: int,
    num_tokens: int,
    errors: Sequence[float],
    *,
    minimum: int = 32,
    cap_factor: int = 3,
) -> list[int]:
    """Layers whose eviction hurts more keep more.

    Every layer starts at `minimum`; the rest is dealt in proportion to the errors, rounded and clipped to
    [minimum, cap_factor * b]. Missing tokens go to the layers with the largest errors below the cap, surplus tokens
    are taken from the layers with the smallest errors above the minimum.

    Args:
        budget: mean tokens per layer.
        num_tokens: the prompt's length, which caps every layer.
        errors: one non-negative number a layer, any scale. All zero means uniform.
    Returns: tokens per layer; the sum is exactly min(budget, num_tokens) * len(errors).
    Source: CompressKV (arXiv 2508.02401), Algorithm 1. Differs: a budget below `minimum` is uniform (the published
    loop has no layer to take from and does not end), and no layer exceeds the prompt.
    """
    num_layers = len(errors)
    budget = min(budget, num_tokens)
    total = budget * num_layers
    floor, cap = min(minimum, budget), min(cap_factor * budget, num_tokens)
    norm = math.fsum(errors)
    shares = [error / norm for error in errors] if norm > 0 else [1 / num_layers] * num_layers
    spare = total - floor * num_layers
    tokens = [min(max(floor + round(share * spare), floor), cap) for share in shares]
    by_error = sorted(range(num_layers), key=lambda layer: shares[layer], reverse=True)
    # One bulk step a layer equals the published single-token steps: each fills or empties one layer before the next.
    # It always ends: floor <= budget <= cap, so all layers together can hold the total.
    missing = total - sum(tokens)
    for layer in by_error:
        added = min(max(missing, 0), cap - tokens[layer])
        tokens[layer] += added
        missing -= added
    for layer in reversed(by_error):
        taken = min(max(-missing, 0), tokens[layer] - floor)
        tokens[layer] -= taken
        missing += taken
    return tokens


def proportional(total: int, shares: Sequence[float], cap: int | Sequence[int]) -> list[int]:
    """`total` dealt in proportion to non-negative `shares`, each at most `cap`; what a cap cuts off goes to the rest.

    Args:
        cap: one for all, or one for each.
    Returns: whole numbers whose sum is exactly min(total, sum of caps). Shares that are all 0 mean uniform.
    """
    counts = [0] * len(shares)
    caps = [cap] * len(shares) if isinstance(cap, int) else cap
    left, total = set(range(len(shares))), min(total, sum(caps))
    while True:
        norm = math.fsum(shares[i] for i in left)
        spare = total - sum(counts[i] for i in range(len(shares)) if i not in left)
        # dividing first keeps denormal shares from rounding the quotient up to infinity
        wanted = {i: spare * (shares[i] / norm if norm > 0 else 1 / len(left)) for i in sorted(left)}
        full = {i for i in left if wanted[i] >= caps[i]}
        if not full or full == left:
            break
        for i in full:
            counts[i] = caps[i]
        left -= full
    if full == left:
        return [caps[i] if i in left else counts[i] for i in range(len(shares))]
    for i, count in zip(wanted, _round_to_sum(list(wanted.values()), spare), strict=True):
        counts[i] = count
    return counts


def _round_to_sum(values: Sequence[float], total: int) -> list[int]:
    """Whole numbers next to `values` whose sum is `total`: the largest fractions are rounded up."""
    floors = [math.floor(value) for value in values]
    by_fraction = sorted(range(len(values)), key=lambda i: values[i] - floors[i], reverse=True)
    for i in by_fraction[: total - sum(floors)]:
        floors[i] += 1
    return floors
