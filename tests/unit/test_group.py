"""Budgets of layers that hold candidates alone."""

import torch

from compresskv.cache.group import Group
from compresskv.methods.snapkv import SnapKV
from compresskv.selection.sharing import proportional


def group(*counts: int) -> Group:
    """Of one row of 100 tokens, whose layers hold so many."""
    candidates = {position: (torch.arange(count)[None, None], [count]) for position, count in enumerate(counts)}
    return Group(SnapKV(), rows=[0], lengths=[100], candidates=candidates)


def test_what_a_layer_does_not_hold_goes_to_the_others() -> None:
    assert group(40, 40)._within_candidates(0, [[60], [20], [10]]) == [[40], [33], [17]]
    assert group(40, 40)._within_candidates(0, [[35, 45], [10, 0], [0, 0]]) == [[39, 40], [11, 0], [0, 0]]


def test_budgets_that_fit_stay() -> None:
    for budgets in ([[40], [40], [100]], [[1, 40], [0, 3], [100, 7]]):
        assert group(40, 40)._within_candidates(0, budgets) is budgets


def test_each_share_has_a_cap_of_its_own() -> None:
    assert proportional(10, [8, 1, 1], [4, 9, 2]) == [4, 4, 2]
    assert proportional(100, [8, 1, 1], [4, 9, 2]) == [4, 9, 2]
