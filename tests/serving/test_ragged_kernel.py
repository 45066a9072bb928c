"""The kernel for KV heads that hold different numbers of tokens, by Triton's interpreter, against plain attention.

Here, since Triton is installed where vLLM is.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from compresskv.attention.plain import grouped_attention
from compresskv.compiled import step_layer
from compresskv.compiled.ragged_kernel import ragged_attention
from compresskv.compiled.step_layer import RaggedLayer


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, ends: Tensor, scaling: float
) -> Tensor:
    """The same in float64, a head after another."""
    groups, outputs = query.shape[1] // len(starts), []
    for head in range(query.shape[1]):
        part = slice(int(starts[head // groups]), int(ends[head // groups]) + 1)
        logits = scaling * torch.einsum("bd,bnd->bn", query[:, head, 0].double(), keys[:, part].double())
        outputs.append(torch.einsum("bn,bnd->bd", logits.softmax(dim=-1), values[:, part].double()))
    return torch.stack(outputs, dim=1)[:, None]


def check(counts: list[int], groups: int, dim: int, batch_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    room = 5  # behind each part, for tokens to come
    starts = torch.tensor([sum(counts[:head]) + head * room for head in range(len(counts))])
    ends = starts + torch.tensor(counts) - 1
    num_slots = sum(counts) + room * len(counts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = draw(batch_size, len(counts) * groups, 1, dim)
    keys, values = (draw(batch_size, num_slots, dim) for _ in range(2))
    given = (query, keys, values, starts, ends, dim**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        ragged_attention(*given).double(), plain_attention(*given), atol=tolerance, rtol=tolerance
    )


def check_layer() -> None:
    """A layer of a recorded step, which reads the parts by the kernel or with a mask."""
    starts, ends = torch.tensor([0, 40]), torch.tensor([30, 90])
    keys, values = (torch.randn(2, 100, 16) for _ in range(2))
    query, scaling = torch.randn(2, 6, 1, 16), 0.3
    layer = RaggedLayer(0, LlamaConfig(attn_implementation="sdpa"), keys, values, starts, ends)

    def attention(*given: Tensor) -> tuple[Tensor, None]:
        return grouped_attention(*given, scaling), None

    found = []
    for by_kernel in (False, True):
        step_layer.reads_by_kernel = lambda _, wanted=by_kernel: wanted  # type: ignore[assignment]
        found.append(layer.attend(attention, query, None, module=torch.nn.Identity(), scaling=scaling)[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def main() -> None:
    """What runs under the interpreter, which must be asked for before Triton is imported."""
    check([1, 63, 64], 4, 16, 1, torch.float32)
    check([300, 1, 1500], 3, 32, 2, torch.float32)  # several splits, of which one head leaves most empty
    check([2000, 700], 1, 16, 1, torch.float32)
    check([130, 40], 8, 64, 2, torch.float16)
    check_layer()


def test_it_computes_what_plain_attention_does() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
