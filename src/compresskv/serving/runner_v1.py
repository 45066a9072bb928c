"""vLLM's first model runner: a batch whose rows are on the host, and lengths that are its own buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from compresskv.serving.runner import CompressedRunner
from compresskv.serving.versions import check_hooks

check_hooks(GPUModelRunner)
check_hooks(MultiGroupBlockTable)


class CompressedRunnerV1(CompressedRunner, GPUModelRunner):
    """vLLM's first runner, for prompts that are cut."""

    def kernel_block_size(self) -> int:
        """See `CompressedRunner`."""
        return int(self.input_batch.block_table[0].block_size)

    def block_ids_of(self, request_id: str) -> Tensor:
        """See `CompressedRunner`."""
        table, row = self.input_batch.block_table[0], self.input_batch.req_id_to_index[request_id]
        block_ids = table.block_table.np[row, : table.num_blocks_per_row[row]]
        return async_tensor_h2d(block_ids, device=self.device, dtype=torch.long)  # type: ignore[no-any-return]

    def replace_blocks(self, request_id: str, block_ids: list[int], on_device: Tensor) -> None:
        """See `CompressedRunner`. vLLM copies the table to the device in each step."""
        table, row = self.input_batch.block_table[0], self.input_batch.req_id_to_index[request_id]
        entries = table.block_table.np[row]
        entries[len(block_ids) : table.num_blocks_per_row[row]] = 0  # as vLLM leaves rows that shrink
        entries[: len(block_ids)] = block_ids
        table.num_blocks_per_row[row] = len(block_ids)
        self.requests[request_id].block_ids[0][:] = block_ids

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        """Inputs of a step, in which cut requests are as long as what they hold; positions are the true ones."""
        if self.compaction is None:
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        if self.looks_at_step:
            self.see_endings(self.input_batch.req_id_to_index, np.cumsum(num_scheduled_tokens))
        lost = self.evicted.by_row(self.input_batch.req_ids)
        if lost is None:
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        with self._slots_without(lost.by_token(num_scheduled_tokens)):
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        self.seq_lens[: len(lost.on_device)] -= lost.on_device
        self.optimistic_seq_lens_cpu[: len(lost.on_host)] -= lost.on_host
        if lost.put is not None:
            put = lost.put.by_token(num_scheduled_tokens)
            self.positions[: len(put)] -= put
        return prepared

    @contextmanager
    def _slots_without(self, lost: Tensor) -> Iterator[None]:
        """While vLLM maps tokens to slots, each counts without what its request has lost: (tokens,)."""
        table = self.input_batch.block_table
        compute = table.compute_slot_mapping
        table.compute_slot_mapping = lambda num_reqs, starts, positions: compute(num_reqs, starts, positions - lost)
        try:
            yield
        finally:
            del table.compute_slot_mapping  # the class's own is behind it
