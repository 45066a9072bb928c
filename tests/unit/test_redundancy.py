"""R-KV's redundancy of keys, beside its definition written out."""

import pytest
import torch
from torch import Tensor

from compresskv.selection import redundancy as module
from compresskv.selection.redundancy import redundancy


def written_out(keys: Tensor, threshold: float) -> Tensor:
    """(T,) of one head's keys (T, D)."""
    num_tokens, means = len(keys), []
    similar = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    for row in range(num_tokens):
        similar[row, row] = 0
        alike = [column for column in range(num_tokens) if similar[row, column] > threshold]
        if alike:
            similar[row, alike[-1]] = 0
    means = [sum(float(similar[row, column]) for row in range(num_tokens)) / num_tokens for column in range(num_tokens)]
    return torch.tensor(means).softmax(dim=0)


def test_as_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 12, 4, generator=generator)
    for nbytes in (1 << 20, 400):  # all rows at once, and a few after another
        monkeypatch.setattr(module, "_ROWS_NBYTES", nbytes)
        found = redundancy(keys, 0.4)
        for row in range(2):
            for head in range(3):
                torch.testing.assert_close(found[row, head], written_out(keys[row, head], 0.4))


def test_padding_takes_no_part() -> None:
    keys = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(12)[None] >= 5
    found = redundancy(keys, 0.4, valid)
    assert float(found[..., :5].abs().sum()) == 0
    torch.testing.assert_close(found[..., 5:], redundancy(keys[:, :, 5:], 0.4))


def test_of_repeated_tokens_the_latest_is_least_redundant() -> None:
    keys = torch.eye(6)[[0, 1, 2, 2, 2, 3]][None, None]
    scores = redundancy(keys, 0.5)[0, 0]
    assert scores[2] > scores[3] > scores[4] == scores[5] == scores[0]
