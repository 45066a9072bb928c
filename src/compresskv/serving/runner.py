"""What both of vLLM's model runners do for prompts that are cut: see `runner_v1` and `runner_v2` for what differs.

A request's positions stay the true ones. Where a token's keys lie, and how many there are, is counted without what its
request has lost; each runner says so to vLLM in its own way.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from compresskv.errors import ServingError
from compresskv.serving.blocks import CompressedAttentionSpec
from compresskv.serving.compaction import Compaction
from compresskv.serving.evicted import EvictedTokens
from compresskv.serving.profiles import with_profile
from compresskv.serving.ranks import Ranks
from compresskv.serving.refusals import check_cache_dtype
from compresskv.serving.room import scratch_nbytes
from compresskv.serving.settings import PlannedEviction, find_settings
from compresskv.serving.tap import EndingPrompt, Noted


class CompressedRunner(LoRAModelRunnerMixin):  # what vLLM's two runners have in common
    """A mixin in front of one of vLLM's runners. It does with prompts what the scheduler says."""

    compaction: Compaction | None = None

    def kernel_block_size(self) -> int:
        """Tokens in a block as the attention backend sees it."""
        raise NotImplementedError

    def block_ids_of(self, request_id: str) -> Tensor:
        """(n,) int64, on the device: the request's blocks."""
        raise NotImplementedError

    def replace_blocks(self, request_id: str, block_ids: list[int], on_device: Tensor) -> None:
        """Let the request have these blocks and no others, from the next step on."""
        raise NotImplementedError

    def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The layers' specs, with our manager.

        Raises:
            ServingError: a layer that is not of plain full attention.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec(*args, **kwargs)
        if any(layer.kv_sharing_target_layer_name for layer in self._layers().values()):
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
        layers = self._layers()
        for layer_idx, layer in layers.items():
            _check_layer(layer_idx, layer)
            check_cache_dtype(layer.kv_cache_dtype, layer.dtype, on_cpu=self.device.type == "cpu")
        self._check_shapes(list(layers.values()))
        method, *others = with_profile(settings, self.model_config, self.load_config.download_dir)
        self.compaction = Compaction(method, layers, self.cache_config.block_size, Ranks(get_tp_group()), *others)
        self.evicted = EvictedTokens(self.device)
        self._planned: Mapping[str, PlannedEviction] = {}
        self._watched: Mapping[str, int] = {}
        self._noted: dict[str, list[tuple[Noted, slice]]] = {}
        """For requests whose next cut is near, the queries of their last tokens."""

    def _layers(self) -> dict[int, Any]:
        """vLLM's Attention modules by their number in the model."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        return {extract_layer_index(name): layer for name, layer in layers.items()}

    def _check_shapes(self, layers: list[Any]) -> None:
        """Refuse what one block table, one layout and one block size do not fit.

        Raises:
            ServingError: layers of different shapes, or blocks that the attention backend divides.
        """
        shapes = {(layer.num_kv_heads, layer.head_size, layer.head_size_v, layer.kv_cache_dtype) for layer in layers}
        if len(shapes) > 1 or any(keys != values for _, keys, values, _ in shapes):
            raise ServingError(
                "compresskv inside vLLM: layers or keys and values of different shapes are not supported"
            )
        block_size, num_blocks = self.cache_config.block_size, self.kv_cache_config.num_blocks
        own, shape = self.kernel_block_size(), tuple(layers[0].kv_cache.shape)
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

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step, then cut the prompts that it has read to their end: the first token is the whole cache's."""
        compaction = self.compaction
        if compaction is None:
            return super().execute_model(scheduler_output, *args, **kwargs)
        self.evicted.forget(scheduler_output)
        self._forget_noted(scheduler_output)
        self._planned = getattr(scheduler_output, "compresskv_evictions", {})
        self._watched = getattr(scheduler_output, "compresskv_watched", {})
        compaction.tap.ending, compaction.tap.watched = [], None
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if compaction.tap.ending:
            with torch.inference_mode():
                for prompt in compaction.tap.ending:
                    self._evict(compaction, prompt, self._planned[prompt.request_id])
            compaction.tap.ending = []
        compaction.clock.settle()
        return output

    def _forget_noted(self, scheduler_output: Any) -> None:
        """Of requests that have ended, or were preempted and are read again."""
        if self._noted:
            again = scheduler_output.scheduled_cached_reqs.resumed_req_ids
            new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
            for request_id in (*scheduler_output.finished_req_ids, *again, *new):
                self._noted.pop(request_id, None)

    @property
    def looks_at_step(self) -> bool:
        """Whether `see_endings` is wanted."""
        return bool(self._planned or self._watched)

    def see_endings(self, rows: Mapping[str, int], ends: np.ndarray) -> None:
        """Let the tap look at what the step cuts, or will soon be cut, once it is known where in the step that is.

        Args:
            rows: where requests are in the batch; those that are not in it are left out.
            ends: (requests,), where their tokens end among those of the step.
        """
        assert self.compaction is not None
        for request_id, planned in self._planned.items():
            row = rows.get(request_id)
            if row is None:  # nothing of it is here, and nothing of it will be read
                continue
            end = int(ends[row])
            window = slice(end - planned.num_observed, end)
            earlier = self._noted.pop(request_id, ())
            prompt = EndingPrompt(request_id, planned.spec, self.block_ids_of(request_id), window, earlier)
            self.compaction.tap.ending.append(prompt)
        if self._watched:
            self._watch(rows, ends)

    def _watch(self, rows: Mapping[str, int], ends: np.ndarray) -> None:
        """Note the queries of some requests' last tokens."""
        assert self.compaction is not None
        tap = self.compaction.tap
        places: list[int] = []
        tap.noted = {}
        for request_id, num_observed in self._watched.items():
            if (row := rows.get(request_id)) is not None:
                part = slice(len(places), len(places) + num_observed)
                places += range(int(ends[row]) - num_observed, int(ends[row]))
                self._noted.setdefault(request_id, []).append((tap.noted, part))
        if places:
            tap.watched = async_tensor_h2d(places, device=self.device, dtype=torch.long)

    def _evict(self, compaction: Compaction, prompt: EndingPrompt, planned: PlannedEviction) -> None:
        targets = async_tensor_h2d(planned.targets, device=self.device, dtype=torch.long)
        compaction.evict(prompt, targets)
        self.replace_blocks(prompt.request_id, planned.targets, targets)
        self.evicted.note(prompt.request_id, planned.spec.num_lost, planned.spec.num_end)


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
