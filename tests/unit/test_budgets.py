"""Budgets: the sum is exact in every corner, and the shares are those of the papers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compresskv.errors import ConfigError
from compresskv.selection.budgets import check_budget, parse_budget, resolve
from compresskv.selection.sharing import error_aware, proportional, pyramid, uniform

budgets = st.integers(1, 2500)
prompts = st.integers(1, 4000)
# Whole numbers scaled down: their shares keep their order after division.
errors = st.lists(st.integers(0, 10**6).map(lambda n: n / 1000), min_size=1, max_size=40)
distinct_errors = st.one_of(
    st.lists(st.integers(0, 10**6).map(lambda n: n / 1000), min_size=1, max_size=40, unique=True),
    # near to each other, so that no layer is capped and rounding leaves a surplus as often as a gap
    st.lists(st.integers(1000, 2000).map(lambda n: n / 1000), min_size=3, max_size=40, unique=True),
)


def algorithm_1(budget: int, num_tokens: int, errors: list[float]) -> list[int]:
    """CompressKV's Algorithm 1 as published, one token at a time; M is capped by the prompt. Ends for budget >= 32."""
    low, high = 32, min(3 * budget, num_tokens)
    total = budget * len(errors)
    norm = math.fsum(errors)
    shares = [error / norm for error in errors]
    tokens = [low + round(share * (total - low * len(errors))) for share in shares]
    tokens = [min(max(count, low), high) for count in tokens]
    while sum(tokens) < total:
        below = [layer for layer in range(len(errors)) if tokens[layer] < high]
        tokens[max(below, key=lambda layer: shares[layer])] += 1
    while sum(tokens) > total:
        above = [layer for layer in range(len(errors)) if tokens[layer] > low]
        tokens[min(above, key=lambda layer: shares[layer])] -= 1
    return tokens


class TestErrorAware:
    @settings(deadline=None, max_examples=200)
    @given(st.integers(32, 2500), st.integers(0, 8000), distinct_errors)
    def test_equals_the_published_loop_where_it_ends(self, budget: int, extra: int, errors: list[float]) -> None:
        assume(sum(errors) > 0)
        assert error_aware(budget, budget + extra, errors) == algorithm_1(budget, budget + extra, errors)

    @settings(deadline=None)
    @given(budgets, prompts, errors)
    def test_sum_is_exact_and_layers_stay_in_bounds(self, budget: int, num_tokens: int, errors: list[float]) -> None:
        tokens = error_aware(budget, num_tokens, errors)
        mean = min(budget, num_tokens)
        assert len(tokens) == len(errors)
        assert sum(tokens) == mean * len(errors)
        assert min(tokens) >= min(32, mean)
        assert max(tokens) <= min(3 * mean, num_tokens)
        assert all(type(count) is int for count in tokens)

    @settings(deadline=None)
    @given(budgets, prompts, errors)
    def test_a_larger_error_never_gets_less(self, budget: int, num_tokens: int, errors: list[float]) -> None:
        by_error = sorted(zip(errors, error_aware(budget, num_tokens, errors), strict=True))
        for (small, fewer), (large, more) in itertools.pairwise(by_error):
            assert small == large or fewer <= more

    @settings(deadline=None)
    @given(budgets, prompts, distinct_errors, st.integers(-6, 6))
    def test_the_scale_of_the_errors_does_not_matter(
        self, budget: int, num_tokens: int, errors: list[float], exponent: int
    ) -> None:
        scaled = [error * 2.0**exponent for error in errors]  # exact in binary
        assert error_aware(budget, num_tokens, scaled) == error_aware(budget, num_tokens, errors)

    def test_by_hand(self) -> None:
        # 4 layers of 64: 256 in all, 128 beside the minimum, dealt 1/16, 3/16, 4/16, 8/16
        assert error_aware(64, 1000, [1, 3, 4, 8]) == [40, 56, 64, 96]

    def test_a_surplus_is_taken_from_the_smallest_error(self) -> None:
        # 8 beside the minimum are dealt as 1.6, 1.7, 1.8 and 2.9, rounded to 9
        assert error_aware(34, 1000, [16, 17, 18, 29]) == [33, 34, 34, 35]

    def test_a_capped_layer_passes_its_surplus_to_the_next_largest_error(self) -> None:
        # 160 beside the minimum, of which the last would get 144 and so 176 in all; the cap is 120 and leaves 56 more
        assert error_aware(40, 120, [*[0.0] * 18, 10, 90]) == [*[32] * 18, 104, 120]

    @pytest.mark.parametrize("mean", [1, 7, 8, 31, 32])
    def test_budgets_up_to_the_minimum_are_uniform(self, mean: int) -> None:
        assert error_aware(mean, 1000, [1.0, 5.0, 0.0]) == [mean] * 3

    @pytest.mark.parametrize(
        ("budget", "num_tokens", "errors"),
        [
            pytest.param(5, 1000, [1, 2, 3], id="below the minimum and the window"),
            pytest.param(256, 1000, [0.25], id="one layer"),
            pytest.param(256, 256, [1, 2, 3], id="the whole prompt"),
            pytest.param(256, 257, [1, 0, 0], id="all layers but for a token at the cap"),
            pytest.param(256, 100, [1, 2, 3], id="above the prompt"),
            pytest.param(256, 20, [1, 2, 3], id="a prompt shorter than the minimum"),
            pytest.param(256, 1, [1, 2, 3], id="a prompt of one token"),
            pytest.param(33, 34, [9, 1, 1], id="one token above the minimum"),
            pytest.param(256, 1000, [0, 0, 0], id="no errors"),
            pytest.param(256, 1000, [0, 1e300, 0, 0], id="one huge error"),
            pytest.param(256, 1000, [5e-324, 0, 0], id="one tiny error"),
        ],
    )
    def test_sum_in_the_corners(self, budget: int, num_tokens: int, errors: list[float]) -> None:
        tokens = error_aware(budget, num_tokens, errors)
        assert sum(tokens) == min(budget, num_tokens) * len(errors)
        assert max(tokens) <= num_tokens

    def test_no_errors_mean_uniform(self) -> None:
        assert error_aware(100, 1000, [0.0] * 7) == [100] * 7


class TestPyramid:
    @settings(deadline=None)
    @given(budgets, st.integers(1, 60), prompts, st.integers(0, 64), st.floats(1, 100))
    def test_sum_order_and_bounds(self, budget: int, layers: int, num_tokens: int, window: int, beta: float) -> None:
        tokens = pyramid(budget, layers, num_tokens, window_size=window, beta=beta)
        mean = min(budget, num_tokens)
        assert len(tokens) == layers
        assert sum(tokens) == mean * layers
        assert tokens == sorted(tokens, reverse=True)
        assert max(tokens) <= num_tokens
        assert min(tokens) >= min(window, mean)

    @settings(deadline=None)
    @given(st.integers(9, 2000), st.integers(2, 60), st.integers(0, 8), st.floats(1, 100))
    def test_the_line_of_the_paper(self, budget: int, layers: int, window: int, beta: float) -> None:
        """Uncapped: last (b - W) / beta, first 2 (b - W) minus that, linear between, W more each."""
        tokens = pyramid(budget, layers, 2 * budget, window_size=window, beta=beta)
        last = (budget - window) / beta
        first = 2 * (budget - window) - last
        line = [window + first + (last - first) * layer / (layers - 1) for layer in range(layers)]
        for count, expected in zip(tokens, line, strict=True):
            assert abs(count - expected) < 1 + 1e-6

    def test_by_hand(self) -> None:
        # b - W = 100: the last keeps 5 + 8, the first 195 + 8
        assert pyramid(108, 3, 1000, window_size=8, beta=20) == [203, 108, 13]

    def test_a_first_layer_above_the_prompt_keeps_the_prompt_and_the_last_more(self) -> None:
        assert pyramid(108, 3, 150, window_size=8, beta=20) == [150, 108, 66]

    @pytest.mark.parametrize("budget", [1, 7, 8])
    def test_within_the_window_is_uniform(self, budget: int) -> None:
        assert pyramid(budget, 4, 1000, window_size=8, beta=20) == [budget] * 4

    def test_one_layer_gets_the_budget(self) -> None:
        assert pyramid(108, 1, 1000, window_size=8, beta=20) == [108]


def water_filled(total: int, shares: list[float], cap: int) -> list[float]:
    """min(cap, level * share) with the level at which they sum to `total`, found by bisection."""
    low, high = 0.0, cap / min(share for share in shares if share > 0)
    for _ in range(200):
        level = (low + high) / 2
        if math.fsum(min(cap, level * share) for share in shares) < total:
            low = level
        else:
            high = level
    return [min(cap, high * share) for share in shares]


class TestProportional:
    @settings(deadline=None, max_examples=200)
    @given(st.integers(0, 5000), errors, st.integers(0, 300))
    def test_sum_is_exact_and_the_cap_holds(self, total: int, shares: list[float], cap: int) -> None:
        counts = proportional(total, shares, cap)
        assert len(counts) == len(shares)
        assert sum(counts) == min(total, cap * len(shares))
        assert all(type(count) is int and 0 <= count <= cap for count in counts)

    @settings(deadline=None, max_examples=200)
    @given(st.integers(0, 5000), errors, st.integers(0, 300))
    def test_a_larger_share_never_gets_less(self, total: int, shares: list[float], cap: int) -> None:
        for (small, fewer), (large, more) in itertools.pairwise(
            sorted(zip(shares, proportional(total, shares, cap), strict=True))
        ):
            assert fewer <= more if small < large else abs(fewer - more) <= 1

    @settings(deadline=None, max_examples=200)
    @given(st.integers(0, 5000), errors, st.integers(1, 300))
    def test_within_one_token_of_the_exact_shares(self, total: int, shares: list[float], cap: int) -> None:
        assume(total <= cap * sum(share > 0 for share in shares))  # beyond that, shares of 0 get tokens
        expected = water_filled(total, shares, cap) if any(shares) else [total / len(shares)] * len(shares)
        for count, exact in zip(proportional(total, shares, cap), expected, strict=True):
            assert abs(count - exact) < 1 + 1e-6

    @settings(deadline=None)
    @given(st.integers(0, 5000), errors, st.integers(0, 300), st.integers(-30, 30))
    def test_the_scale_of_the_shares_does_not_matter(
        self, total: int, shares: list[float], cap: int, exponent: int
    ) -> None:
        scaled = [share * 2.0**exponent for share in shares]  # exact in binary
        assert proportional(total, scaled, cap) == proportional(total, shares, cap)

    @settings(deadline=None)
    @given(st.integers(0, 5000), st.integers(1, 40), st.integers(0, 300))
    def test_no_shares_mean_uniform(self, total: int, num_shares: int, cap: int) -> None:
        counts = proportional(total, [0.0] * num_shares, cap)
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == min(total, cap * num_shares)

    @pytest.mark.parametrize(
        ("total", "shares", "cap", "expected"),
        [
            pytest.param(8, [1, 3, 4], 8, [1, 3, 4], id="whole numbers"),
            pytest.param(10, [1, 1, 1], 10, [4, 3, 3], id="a rest goes to the first of equals"),
            pytest.param(10, [1, 2, 4], 10, [1, 3, 6], id="largest remainders"),
            pytest.param(10, [8, 1, 1], 4, [4, 3, 3], id="a cap's surplus goes to the rest"),
            pytest.param(15, [100, 10, 1, 1], 6, [6, 6, 2, 1], id="the surplus fills another"),
            pytest.param(10, [1, 0, 0], 4, [4, 3, 3], id="what only zeros can take is dealt evenly"),
            pytest.param(100, [1, 2, 3], 5, [5, 5, 5], id="more than there is room for"),
            pytest.param(7, [0, 1e300, 0], 9, [0, 7, 0], id="one huge share"),
            pytest.param(7, [5e-324, 0, 0], 9, [7, 0, 0], id="one tiny share"),
            pytest.param(0, [1, 2], 9, [0, 0], id="nothing to deal"),
        ],
    )
    def test_by_hand(self, total: int, shares: list[float], cap: int, expected: list[int]) -> None:
        assert proportional(total, shares, cap) == expected


@pytest.mark.parametrize(("budget", "num_tokens", "expected"), [(3, 10, 3), (10, 10, 10), (11, 10, 10)])
def test_uniform(budget: int, num_tokens: int, expected: int) -> None:
    assert uniform(budget, 4, num_tokens) == [expected] * 4


class TestCheckBudget:
    @pytest.mark.parametrize(
        "budget", [1, 256, 10**9, 0.03, 1e-9, 1.0, np.float64(0.03), [1], [64, 128], (64, 128), range(1, 4)]
    )
    def test_good(self, budget: object) -> None:
        assert check_budget(budget) is budget  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("budget", "named"),
        [
            (0, "budget=0 "),
            (-5, "budget=-5 "),
            (0.0, "budget=0.0 "),
            (-0.1, "budget=-0.1 "),
            (1.5, "budget=1.5 "),
            (256.0, "budget=256.0 "),
            (math.nan, "budget=nan "),
            (math.inf, "budget=inf "),
            (-math.inf, "budget=-inf "),
            (True, "budget=True "),
            (False, "budget=False "),
            (None, "budget=None "),
            ("256", "budget='256' "),
            ("3%", "budget='3%' "),
            (b"256", "budget=b'256' "),
            (bytearray(b"256"), "budget=bytearray(b'256') "),
            ([], "budget=[] "),
            ((), "budget=() "),
            ([0, 64], "holds 0 for layer 0"),
            ([64, -3], "holds -3 for layer 1"),
            ([64, 12.5], "holds 12.5 for layer 1"),
            ([64, True], "holds True for layer 1"),
            ([64, "12"], "holds '12' for layer 1"),
            ([64, None], "holds None for layer 1"),
            ([64, np.int64(3)], "holds np.int64(3) for layer 1"),
            ({64: 1}, "budget={64: 1} "),
            ({64}, "budget={64} "),
            ((count for count in (64, 64)), "generator"),
            (1j, "budget=1j "),
            # numpy's scalars are refused, not converted: a count has one type everywhere, also in results as JSON
            (np.int64(256), "budget=np.int64(256) "),
            (np.float32(0.03), "budget=np.float32(0.03) "),
            (np.array([64, 64]), "budget=array([64, 64]) "),
            (np.zeros((2, 2)), "budget=array("),
            (torch.tensor(256), "budget=tensor(256) "),
            (torch.tensor([[64], [64]]), "budget=tensor("),
        ],
    )
    def test_bad(self, budget: object, named: str) -> None:
        with pytest.raises(ConfigError) as caught:
            check_budget(budget)  # type: ignore[arg-type]
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_numpy_is_told_the_way_out(self) -> None:
        with pytest.raises(ConfigError, match=r"int\(\.\.\.\)"):
            check_budget(np.int64(256))  # type: ignore[arg-type]


class TestParseBudget:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("256", 256),
            ("+256", 256),
            (" 256 ", 256),
            ("1", 1),
            ("0.03", 0.03),
            (".5", 0.5),
            ("3e-2", 0.03),
            ("1.0", 1.0),
            ("3%", 0.03),
            ("0.7%", 0.007),
            ("3 %", 0.03),
            ("100%", 1.0),
        ],
    )
    def test_good(self, text: str, expected: float) -> None:
        value = parse_budget(text)
        assert value == pytest.approx(expected, rel=1e-12)
        assert type(value) is type(expected)

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            *(
                (text, f"budget={text!r} is no budget: give tokens")
                for text in ["", "%", "abc", "²", "--5", "3%%", "64,128", "True", "None", "0x10"]
            ),
            *((text, f"budget={text!r} must be at least 1 token") for text in ["0", "-5"]),
            *(
                (text, f"budget={text!r} is no share of the prompt")
                for text in ["0.0", "-0.1", "1.5", "256.0", "nan", "inf", "-inf", "1e3", "0%", "-3%", "150%", "nan%"]
            ),
            (" ", "budget='' "),
            pytest.param("9" * 5000, "budget='999", id="more digits than Python reads"),
        ],
    )
    def test_bad(self, text: str, named: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_budget(text)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


class TestResolve:
    @settings(deadline=None)
    @given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**6))
    def test_a_fraction_is_rounded_and_at_least_one_token(self, fraction: float, num_tokens: int) -> None:
        count = resolve(fraction, num_tokens)
        assert 1 <= count <= num_tokens
        assert count == 1 or abs(count - fraction * num_tokens) <= 0.5 + 1e-6

    @settings(deadline=None)
    @given(budgets, prompts)
    def test_a_count_is_at_most_the_prompt(self, budget: int, num_tokens: int) -> None:
        assert resolve(budget, num_tokens) == min(budget, num_tokens)

    @pytest.mark.parametrize(
        ("fraction", "num_tokens", "expected"),
        [(0.03, 1000, 30), (0.5, 5, 3), (0.5, 4, 2), (1.0, 7, 7), (1e-9, 7, 1), (0.0349, 100, 3), (0.035, 100, 4)],
    )
    def test_by_hand(self, fraction: float, num_tokens: int, expected: int) -> None:
        assert resolve(fraction, num_tokens) == expected
