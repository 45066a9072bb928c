"""The model runner's part: a request's physical length apart from its positions, and the cut after the last chunk."""

from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from compresskv.errors import CacheStateError, ServingError
from compresskv.serving.blocks import CompressedAttentionSpec
from compresskv.serving.compaction import Compaction
from compresskv.serving.profiles import with_profile
from compresskv.serving.ranks import Ranks
from compresskv.serving.settings import Cut, find_settings
from compresskv.serving.tap import EndingPrompt
from compresskv.serving.versions import check_signature

check_signature(GPUModelRunner._prepare_inputs, "self", "scheduler_output", "num_scheduled_tokens")
check_signature(GPUModelRunner.execute_model, "self", "scheduler_output", "intermediate_tensors")
check_signature(GPUModelRunner.get_kv_cache_spec, "self")


class CompressedRunner(GPUModelRunner):
    """A mixin in front of a platform's runner. Only counts are kept between steps, and even those follow from the
    requests: a prompt that was read to its end is cut, any other is whole."""

    compaction: Compaction | None = None

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """The layers' specs, with our manager.

        Raises:
            ServingError: a layer that is not of plain full attention.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec()
        if self.shared_kv_cache_layers:
            raise ServingError("compresskv inside vLLM: layers that share a KV cache are not supported")
        return {name: _compressed(name, spec) for name, spec in specs.items()}

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        """Allocate the cache and make ready to evict from it."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling or self.compaction is not None:
            return
        settings = find_settings(self.vllm_config.additional_config)
        assert settings is not None  # this class is chosen by them
        self._settings = settings
        layers = {
            extract_layer_index(name): layer
            for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention).items()
        }
        for layer_idx, layer in layers.items():
            _check_layer(layer_idx, layer)
        self._check_shapes(list(layers.values()))
        ranks = Ranks(get_tp_group())
        self._ending: list[EndingPrompt] = []
        method = with_profile(settings, self.model_config, self.load_config.download_dir)
        self.compaction = Compaction(method, layers, self.cache_config.block_size, ranks)

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

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        """Inputs of a step, in which cut requests are as long as what they hold; positions stay the true ones."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if self.compaction is not None:
            gone = self._look_at_requests(num_scheduled_tokens)
            if gone.any():
                self._shorten(gone, num_scheduled_tokens)
        return prepared

    def _look_at_requests(self, num_scheduled_tokens: np.ndarray) -> np.ndarray:
        """Tokens that each request has lost, (requests,); notes the prompts that end in this step."""
        batch = self.input_batch
        gone = np.zeros(batch.num_reqs, dtype=np.int32)
        ends = np.cumsum(num_scheduled_tokens)
        for row, request_id in enumerate(batch.req_ids):
            cut = self._cut(request_id, int(batch.num_prompt_tokens[row]))
            if cut is None:
                continue
            num_computed = int(batch.num_computed_tokens_cpu[row])
            num_after = num_computed + int(num_scheduled_tokens[row])
            if num_computed >= cut.num_prompt:
                gone[row] = cut.num_evicted
            elif num_after == cut.num_prompt and num_scheduled_tokens[row] >= cut.window_size:
                window = slice(int(ends[row]) - cut.window_size, int(ends[row]))
                self._ending.append(EndingPrompt(request_id, row, cut, window))
            elif num_after >= cut.num_prompt:
                raise CacheStateError(
                    f"request {request_id}: a step from token {num_computed} to {num_after} does not end with its "
                    f"prompt of {cut.num_prompt} tokens, or holds less than its window of {cut.window_size}"
                )
        return gone

    def _cut(self, request_id: str, num_prompt: int) -> Cut | None:
        extra_args = self.requests[request_id].sampling_params.extra_args
        if not self.cache_config.enable_prefix_caching:
            return self._settings.requested_cut(num_prompt, extra_args)
        num_blocks = self.kv_cache_config.num_blocks - 1
        return self._settings.cut_in_pool(num_prompt, extra_args, self.cache_config.block_size, num_blocks)

    def _shorten(self, gone: np.ndarray, num_scheduled_tokens: np.ndarray) -> None:
        """Let lengths and slots count what is stored."""
        num_reqs, num_tokens = len(gone), int(num_scheduled_tokens.sum())
        by_request = torch.from_numpy(gone)
        by_token = torch.from_numpy(np.repeat(gone, num_scheduled_tokens))
        self.seq_lens[:num_reqs] -= by_request.to(self.seq_lens.device)
        self.optimistic_seq_lens_cpu[:num_reqs] -= by_request
        self.input_batch.block_table.compute_slot_mapping(
            num_reqs,
            self.query_start_loc.gpu[: num_reqs + 1],
            self.positions[:num_tokens] - by_token.to(self.positions.device),
        )

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run a step, then cut the prompts that it has read to their end: the first token is the whole cache's."""
        if self.compaction is None:
            return super().execute_model(scheduler_output, intermediate_tensors)
        self._ending = self.compaction.tap.ending = []
        try:
            output = super().execute_model(scheduler_output, intermediate_tensors)
            targets = self._agreed_targets(scheduler_output)
            with torch.inference_mode():
                for prompt in self._ending:
                    self._evict(self.compaction, prompt, targets[prompt.request_id])
        finally:
            self._ending.clear()
        self.compaction.clock.settle()
        return output

    def _agreed_targets(self, scheduler_output: Any) -> dict[str, list[int]]:
        """The blocks that the retained tokens of each ending prompt move to.

        Raises:
            CacheStateError: the scheduler cuts other requests in this step than the runner.
        """
        targets: dict[str, list[int]] = getattr(scheduler_output, "compresskv_blocks", {})
        own = {prompt.request_id for prompt in self._ending}
        if own != targets.keys():
            raise CacheStateError(
                f"scheduler and worker disagree about the prompts that this step ends: {sorted(targets)} against "
                f"{sorted(own)}"
            )
        return targets

    def _evict(self, compaction: Compaction, prompt: EndingPrompt, targets: list[int]) -> None:
        table = self.input_batch.block_table[0]
        num_blocks = int(table.num_blocks_per_row[prompt.row])
        row = table.block_table.np[prompt.row]
        block_ids = torch.from_numpy(row[:num_blocks]).to(self.device, torch.long)
        compaction.evict(prompt, block_ids, torch.tensor(targets, device=self.device))
        row[: len(targets)] = targets
        row[len(targets) : num_blocks] = 0  # as vLLM leaves rows that shrink
        table.num_blocks_per_row[prompt.row] = len(targets)
        self.requests[prompt.request_id].block_ids[0][:] = targets


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
