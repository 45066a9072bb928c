"""The model runner's part: a request's physical length apart from its positions, and the cut after the last chunk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from compresskv.errors import ServingError
from compresskv.serving.blocks import CompressedAttentionSpec
from compresskv.serving.compaction import Compaction
from compresskv.serving.profiles import with_profile
from compresskv.serving.ranks import Ranks
from compresskv.serving.room import scratch_nbytes
from compresskv.serving.settings import PlannedEviction, find_settings
from compresskv.serving.tap import EndingPrompt
from compresskv.serving.versions import check_hooks

check_hooks(GPUModelRunner)
check_hooks(MultiGroupBlockTable)

_NOTHING = np.zeros(0, dtype=np.int32)


class CompressedRunner(GPUModelRunner):
    """A mixin in front of a platform's runner. It does with prompts what the scheduler says."""

    compaction: Compaction | None = None

    def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The layers' specs, with our manager.

        Raises:
            ServingError: a layer that is not of plain full attention.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec(*args, **kwargs)
        if self.shared_kv_cache_layers:
            raise ServingError("compresskv inside vLLM: layers that share a KV cache are not supported")
        return {name: _compressed(name, spec) for name, spec in specs.items()}

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Let vLLM see how much memory it needs, with what eviction takes: the KV cache gets what is left."""
        scratch = torch.empty(scratch_nbytes(self.model_config), dtype=torch.uint8, device=self.device)
        super().profile_run(*args, **kwargs)
        del scratch

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **kwargs: Any) -> None:
        """Allocate the cache, anew if there is one, and make ready to evict from it."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if is_profiling:
            return
        if self.compaction is not None:
            self.compaction.tap.remove()
        settings = find_settings(self.vllm_config.additional_config)
        assert settings is not None  # this class is chosen by them
        layers = {
            extract_layer_index(name): layer
            for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention).items()
        }
        for layer_idx, layer in layers.items():
            _check_layer(layer_idx, layer)
        self._check_shapes(list(layers.values()))
        method = with_profile(settings, self.model_config, self.load_config.download_dir)
        self.compaction = Compaction(method, layers, self.cache_config.block_size, Ranks(get_tp_group()))
        self._num_evicted: dict[str, int] = {}
        """Of requests whose prompt was cut, until they end or are read again."""
        self._rows: list[str] = []
        self._gone = _NOTHING
        self._planned: Mapping[str, PlannedEviction] = {}

    def _check_shapes(self, layers: list[Any]) -> None:
        """Refuse what one block table, one layout and one block size do not fit.

        Raises:
            ServingError: layers of different shapes, or blocks that the attention backend divides.
        """
        shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v) for layer in layers}
        if len(shapes) > 1 or any(keys != values for _, keys, values in shapes):
            raise ServingError(
                "compresskv inside vLLM: layers or keys and values of different shapes are not supported"
            )
        block_size, num_blocks = self.cache_config.block_size, self.kv_cache_config.num_blocks
        own, shape = self.input_batch.block_table[0].block_size, tuple(layers[0].kv_cache.shape)
        if own != block_size:
            raise ServingError(
                f"compresskv inside vLLM: the attention backend divides blocks of {block_size} tokens into ones of "
                f"{own}, which is not supported: give --block-size {own}"
            )
        if shape[0] != num_blocks:
            raise ServingError(
                f"compresskv inside vLLM: attention backend {type(layers[0].impl).__name__} keeps its cache as "
                f"{shape}, not as {num_blocks} blocks one after another, which is not supported"
            )

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        """Inputs of a step, in which cut requests are as long as what they hold; positions stay the true ones."""
        if self.compaction is None:
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        if self._planned:
            self.compaction.tap.ending = self._ending_prompts(num_scheduled_tokens)
        gone = self._evicted_by_row() if self._num_evicted else _NOTHING
        if not gone.any():
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        with self._slots_by_what_is_stored(np.repeat(gone, num_scheduled_tokens)):
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        by_request = torch.from_numpy(gone)
        self.seq_lens[: len(gone)] -= by_request.to(self.seq_lens.device)
        self.optimistic_seq_lens_cpu[: len(gone)] -= by_request
        return prepared

    def _evicted_by_row(self) -> np.ndarray:
        """Tokens that each request of the batch has lost, (requests,). Made anew only where the batch is another."""
        request_ids = self.input_batch.req_ids
        if request_ids != self._rows:
            evicted = self._num_evicted
            self._rows = list(request_ids)
            self._gone = np.array([evicted.get(request_id, 0) for request_id in request_ids], dtype=np.int32)
        return self._gone

    def _ending_prompts(self, num_scheduled_tokens: np.ndarray) -> list[EndingPrompt]:
        """The prompts that this step ends, and where in it their windows are."""
        batch, ends = self.input_batch, np.cumsum(num_scheduled_tokens)
        table, prompts = batch.block_table[0], []
        for request_id, planned in self._planned.items():
            row = batch.req_id_to_index.get(request_id)
            if row is None:  # nothing of it is here, and nothing of it will be read
                continue
            block_ids = torch.from_numpy(table.block_table.np[row, : table.num_blocks_per_row[row]])
            window = slice(int(ends[row]) - planned.spec.window_size, int(ends[row]))
            prompts.append(EndingPrompt(request_id, planned.spec, block_ids.to(self.device, torch.long), window))
        return prompts

    @contextmanager
    def _slots_by_what_is_stored(self, gone: np.ndarray) -> Iterator[None]:
        """While vLLM maps tokens to slots, each counts without what its request has lost: (tokens,)."""
        table = self.input_batch.block_table
        compute = table.compute_slot_mapping
        table.compute_slot_mapping = lambda num_reqs, starts, positions: compute(
            num_reqs, starts, positions - torch.from_numpy(gone).to(positions.device)
        )
        try:
            yield
        finally:
            del table.compute_slot_mapping  # the class's own is behind it

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run a step, then cut the prompts that it has read to their end: the first token is the whole cache's."""
        compaction = self.compaction
        if compaction is None:
            return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        self._forget(scheduler_output)
        self._planned = getattr(scheduler_output, "compresskv_evictions", {})
        compaction.tap.ending = []
        output = super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        if compaction.tap.ending:
            with torch.inference_mode():
                for prompt in compaction.tap.ending:
                    self._evict(compaction, prompt, self._planned[prompt.request_id])
            compaction.tap.ending = []
        compaction.clock.settle()
        return output

    def _forget(self, scheduler_output: Any) -> None:
        """What is known of requests that have ended, were preempted and are read again, or have come anew."""
        if not self._num_evicted:
            return
        again = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        for request_id in (*scheduler_output.finished_req_ids, *again, *new):
            if self._num_evicted.pop(request_id, 0):
                self._rows = []

    def _evict(self, compaction: Compaction, prompt: EndingPrompt, planned: PlannedEviction) -> None:
        targets, request_id = planned.targets, prompt.request_id
        compaction.evict(prompt, torch.tensor(targets, device=self.device))
        table, row = self.input_batch.block_table[0], self.input_batch.req_id_to_index[request_id]
        entries = table.block_table.np[row]
        entries[: len(targets)] = targets
        entries[len(targets) : len(prompt.block_ids)] = 0  # as vLLM leaves rows that shrink
        table.num_blocks_per_row[row] = len(targets)
        self.requests[request_id].block_ids[0][:] = targets
        self._num_evicted[request_id] = planned.spec.num_evicted
        self._rows = []


def _compressed(name: str, spec: Any) -> CompressedAttentionSpec:
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise ServingError(
            f"compresskv inside vLLM: layer {name} is not of plain full attention ({type(spec).__name__})"
        )
    return CompressedAttentionSpec(**vars(spec))


def _check_layer(layer_idx: int, layer: Any) -> None:
    """Refuse attention whose scores are not those of queries and keys alone.

    Raises:
        ServingError: naming the layer.
    """
    if getattr(layer.impl, "alibi_slopes", None) is not None or layer.has_sink or layer.attn_type != "decoder":
        raise ServingError(
            f"compresskv inside vLLM: layer {layer_idx} has ALiBi, attention sinks, or no causal attention"
        )
