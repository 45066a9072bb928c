"""vLLM's second model runner: requests keep a slot each, and what attention reads of them is on the device."""

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState

from compresskv.serving.runner import CompressedRunner
from compresskv.serving.versions import check_hooks

check_hooks(GPUModelRunner, "GPUModelRunnerV2")
check_hooks(ModelState)


class CompressedRunnerV2(CompressedRunner, GPUModelRunner):
    """vLLM's second runner, for prompts that are cut."""

    _shifted: tuple[Tensor, Tensor] | None = None
    """The step's positions while the model is called, and by how much less than vLLM's they are."""

    def kernel_block_size(self) -> int:
        """See `CompressedRunner`."""
        return int(self.kernel_block_sizes[0])

    def block_ids_of(self, request_id: str) -> Tensor:
        """See `CompressedRunner`."""
        tables, slot = self.block_tables, self.req_states.req_id_to_index[request_id]
        block_ids: Tensor = tables.block_tables[0].gpu[slot, : int(tables.num_blocks.np[0, slot])]
        return block_ids.long()

    def replace_blocks(self, request_id: str, block_ids: list[int], on_device: Tensor) -> None:
        """See `CompressedRunner`.

        The row is written in the device's order, not by vLLM's staged writes: these run at once in the next step, where
        the slot may be another request's already. Their number goes to the device at the beginning of each step.
        """
        tables, slot = self.block_tables, self.req_states.req_id_to_index[request_id]
        tables.block_tables[0].gpu[slot, : len(block_ids)] = on_device
        tables.num_blocks.np[0, slot] = len(block_ids)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and let attention be told how long requests are without what they have lost."""
        super().load_model(*args, **kwargs)
        self._held_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
        self._prepare_metadata = self.model_state.prepare_attn
        self.model_state.prepare_attn = self._prepare_metadata_of_what_is_held

    def prepare_attn(self, input_batch: Any) -> Any:
        """Block tables, and the slots that the step's tokens go to, counted without what requests have lost."""
        if self.compaction is None:
            return super().prepare_attn(input_batch)
        if self.looks_at_step:
            rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
            self.see_endings(rows, input_batch.query_start_loc_np[1:])
        lost = self.evicted.by_row(input_batch.req_ids)
        if lost is None:
            return super().prepare_attn(input_batch)
        held = copy.copy(input_batch)
        by_token = lost.by_token(input_batch.num_scheduled_tokens)
        held.positions = input_batch.positions[: len(by_token)] - by_token
        if lost.put is not None:  # the model is called with them after this
            put = lost.put.by_token(input_batch.num_scheduled_tokens)
            self._shifted = input_batch.positions[: len(put)], put
            input_batch.positions[: len(put)] -= put
        return super().prepare_attn(held)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """See `CompressedRunner`. The sampler counts by vLLM's positions again, from the prompt as vLLM knows it."""
        self._shifted = None
        output = super().execute_model(*args, **kwargs)
        if self._shifted is not None:
            positions, put = self._shifted
            positions += put
        return output

    def _prepare_metadata_of_what_is_held(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's own, with other lengths.

        They lie in one place, which CUDA graphs are captured with. The batch's own stay as they are: the sampler looks
        there whether a prompt has been read to its end.
        """
        held, num_reqs = copy.copy(input_batch), input_batch.num_reqs
        held.seq_lens = self._held_lens[: len(input_batch.seq_lens)]
        held.seq_lens.copy_(input_batch.seq_lens)
        lost = None if self.compaction is None else self.evicted.by_row(input_batch.req_ids)
        if lost is not None:
            held.seq_lens[:num_reqs] -= lost.on_device
            held.seq_lens_cpu_upper_bound = input_batch.seq_lens_cpu_upper_bound.clone()
            held.seq_lens_cpu_upper_bound[:num_reqs] -= lost.on_host
        return self._prepare_metadata(held, *args, **kwargs)
