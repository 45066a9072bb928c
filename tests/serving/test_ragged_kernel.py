"""The kernel for KV heads that hold different numbers of tokens, by Triton's interpreter, against plain attention.

Here, since Triton is installed where vLLM is.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from compresskv.attention.plain import grouped_attention
from compresskv.compiled import step_layer
from compresskv.compiled.ragged_kernel import launch_options, ragged_attention
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


class NoGPU:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for_gpus() -> None:
    """Compile it as a launch would, for GPUs that are not there; what it then needs small ones have, too."""
    from triton.runtime import driver

    from compresskv.compiled.triton_kernels import read_split

    small = [(86, dtype, dim) for dtype in (torch.bfloat16, torch.float32) for dim in (64, 128, 256)]
    for capability, dtype, dim in [*small, (80, torch.float16, 128), (90, torch.bfloat16, 128)]:
        driver.set_active(NoGPU(capability))
        given = (dtype,) * 3 + (torch.int64,) * 2 + (torch.float32,) * 3 + (0.1, 1024, 4)
        code = read_split.warmup(*given, **launch_options(4, dim, dtype.itemsize), grid=(1, 8, 4))
        assert code.asm["cubin"]
        assert code.metadata.shared <= 99 * 1024, (dtype, dim, code.metadata.shared)


def run(*, interpreted: bool) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, *([] if interpreted else ["compile"])],
        env={**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_computes_what_plain_attention_does() -> None:
    run(interpreted=True)


def test_there_is_code_of_it_for_gpus() -> None:
    run(interpreted=False)


if __name__ == "__main__":
    compile_for_gpus() if sys.argv[1:] else main()
