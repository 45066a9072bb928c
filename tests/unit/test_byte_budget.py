"""Budgets in bytes: what is typed, how many tokens that is, and what cannot be held."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskv.errors import ConfigError
from compresskv.selection.budgets import budget_order, check_budget, in_tokens, parse_budget
from compresskv.selection.byte_budget import ByteBudget, Costs, find_byte_budget
from compresskv.selection.precision import find_precision


@pytest.mark.parametrize(
    ("text", "count", "share"),
    [
        ("3MB", 3e6, None),
        (" 1.5 GB ", 1.5e9, None),
        ("64KiB", 65536, None),
        ("12kB", 12e3, None),
        ("12KB", 12e3, None),
        ("100B", 100, None),
        ("5% of bytes", None, 0.05),
        ("0.05 of bytes", None, 0.05),
        ("100% of bytes", None, 1.0),
    ],
)
def test_what_names_bytes(text: str, count: float | None, share: float | None) -> None:
    found = find_byte_budget(text)
    assert found is not None
    assert found.count == count
    assert found.share == (None if share is None else pytest.approx(share))
    assert check_budget(text) == text
    assert parse_budget(text) == text.strip()


def test_a_share_is_of_tokens_unless_it_is_said_to_be_of_bytes() -> None:
    assert parse_budget("5%") == 0.05
    assert parse_budget("5%", "bytes") == "5% of bytes"
    assert parse_budget("0.05", "bytes") == "0.05 of bytes"
    assert parse_budget("3MB", "bytes") == "3MB"


@pytest.mark.parametrize(
    ("text", "of", "told"),
    [
        ("0MB", "tokens", "budget='0MB' must be more than 0"),
        ("101% of bytes", "tokens", "a share at most all"),
        ("0", "bytes", "budget='0' is no share"),
        ("256", "bytes", "budget='256' is no share"),
        ("3", "heads", "of='heads' must be tokens or bytes"),
        ("3XB", "tokens", "bytes in all layers (3MB, or 5% of bytes)"),
    ],
)
def test_what_is_none(text: str, of: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_budget(text, of)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_text_that_names_no_bytes_and_bytes_where_tokens_are_needed() -> None:
    with pytest.raises(ConfigError, match="budget='256' is text, and names no bytes"):
        check_budget("256")
    with pytest.raises(ConfigError, match="budgets='3MB' is in bytes: give tokens"):
        in_tokens("3MB", "budgets")
    with pytest.raises(ConfigError, match="store='int9' is unknown"):
        find_precision("int9")


@given(
    st.integers(1, 10**7),
    st.integers(1, 10**4),
    st.builds(Costs, full=st.integers(2, 10**5), held=st.integers(1, 10**5), fixed=st.integers(0, 10**4)),
)
def test_the_tokens_fit_and_no_more_would(count: int, num_tokens: int, costs: Costs) -> None:
    budget = ByteBudget("x", count=count)
    if count < costs.held + costs.fixed:
        with pytest.raises(ConfigError, match="no room for one token"):
            budget.tokens(num_tokens, costs)
        return
    tokens = budget.tokens(num_tokens, costs)
    assert 1 <= tokens <= num_tokens
    assert tokens * costs.held + costs.fixed <= count
    assert tokens == num_tokens or (tokens + 1) * costs.held + costs.fixed > count


def test_a_share_of_bytes_is_more_tokens_where_they_are_smaller() -> None:
    budget = find_byte_budget("5% of bytes")
    assert budget is not None
    assert budget.tokens(2000, Costs(full=256, held=256)) == 100
    assert budget.tokens(2000, Costs(full=256, held=64)) == 400
    assert budget.tokens(3, Costs(full=256, held=64, fixed=500)) == 1


def test_all_kinds_of_budgets_have_an_order() -> None:
    ordered = [None, 0.03, 0.5, 64, 128, "1% of bytes", "5% of bytes", "900kB", "3MB"]
    shuffled = ordered[::-1]
    assert sorted(shuffled, key=budget_order) == ordered
