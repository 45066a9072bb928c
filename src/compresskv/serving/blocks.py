"""Blocks of requests whose prompt was cut: how many they need, and how the others are given back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from compresskv.selection.cuts import most_held
from compresskv.serving.settings import EvictionSpec, find_settings
from compresskv.serving.versions import check_hooks

check_hooks(FullAttentionManager)
check_hooks(FullAttentionSpec)


class CompressedAttentionManager(FullAttentionManager):
    """Counts a request's tokens without those that were evicted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        """For each request whose prompt was cut, the tokens that are gone."""
        self._num_wanted: dict[str, int] = {}
        self._most_tokens: dict[str, int] = {}
        self._fresh: dict[str, list[Any]] = {}

    def num_needed(self, specs: Sequence[EvictionSpec], num_prompt: int) -> int:
        """Blocks that a prompt needs at once while it is read and cut.

        With prefix caching, what the first cut retains lies beside the prompt's own blocks for one step.
        """
        needed: int = cdiv(most_held(num_prompt, specs), self.block_size)
        if specs and self.enable_caching:
            first = specs[0]
            needed = max(needed, cdiv(first.num_held, self.block_size) + cdiv(first.num_kept, self.block_size))
        return needed

    def num_needed_to_generate(self, first: EvictionSpec, most_held: int, *, moves: bool) -> int:
        """Blocks that a request needs at once while its answer is cut.

        Args:
            first: its first cut.
            moves: whether the blocks are others' too until then.
        """
        needed: int = cdiv(most_held, self.block_size)
        if moves and self.enable_caching:
            needed = max(needed, cdiv(first.num_held, self.block_size) + cdiv(first.num_kept, self.block_size))
        return needed

    @property
    def num_usable(self) -> int:
        """Blocks of the pool that requests can have: one is vLLM's own."""
        return int(self.block_pool.num_gpu_blocks) - 1

    def prepare(self, request_id: str, spec: EvictionSpec | None, most_tokens: int) -> None:
        """Say before each allocation whether the request is cut in this very step; None: it is not.

        With prefix caching, the prompt's blocks may be others' too, and stay cached as they are: what is retained moves
        to fresh blocks, which are allocated together with those of the chunk. After that all blocks are its own.

        Args:
            most_tokens: that the request will hold at once, as far as it is known.
        """
        self._most_tokens[request_id] = most_tokens
        self._num_wanted.pop(request_id, None)
        if spec is not None and self._moves(request_id):
            self._num_wanted[request_id] = cdiv(spec.num_kept, self.block_size)

    def _moves(self, request_id: str) -> bool:
        """Whether what the request's next cut retains goes to other blocks."""
        return bool(self.enable_caching) and request_id not in self.num_evicted

    def evict(self, request_id: str, spec: EvictionSpec) -> tuple[list[int], int] | None:
        """Give back the blocks that are not needed for the retained tokens.

        Returns: the blocks that the retained tokens move to, and how many more are free for others than without the
            cut: those that other requests share are not, and none may be, where most are shared. None, and nothing is
            given back, where there are no blocks to move to.
        """
        blocks, num_free = self.req_to_blocks[request_id], self.block_pool.get_num_free_blocks()
        num_held = cdiv(spec.num_kept, self.block_size)
        if self._moves(request_id):
            kept, freed, num_fresh = self._fresh.pop(request_id, []), list(blocks), num_held
        else:
            kept, freed, num_fresh = blocks[:num_held], blocks[num_held:], 0
        if not kept:
            return None
        blocks[:] = kept
        self.num_evicted[request_id] = spec.num_lost
        self.block_pool.free_blocks(reversed(freed))
        num_freed = self.block_pool.get_num_free_blocks() - num_free - num_fresh
        return [block.block_id for block in kept], max(0, num_freed)

    def keep(self, request_id: str) -> None:
        """Give back what was allocated for a cut that is not made after all."""
        self.block_pool.free_blocks(self._fresh.pop(request_id, ()))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that are missing for `num_tokens` tokens, the evicted ones among them."""
        num_held = num_tokens - self.num_evicted.get(request_id, 0)
        # Admission asks for the whole request's blocks; the allocation itself asks again, for this step's.
        is_admission, num_wanted = kwargs.get("apply_admission_cap"), self._num_wanted.get(request_id, 0)
        if is_admission:
            num_held, num_wanted = min(num_held, self._most_tokens.get(request_id, num_held)), 0
        num_missing: int = super().get_num_blocks_to_allocate(request_id, num_held, *args, **kwargs)
        return num_missing + num_wanted

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The blocks that were missing."""
        gone = self.num_evicted.get(request_id, 0)
        blocks = super().allocate_new_blocks(
            request_id, num_tokens - gone, num_tokens_main_model - gone, *args, **kwargs
        )
        num_wanted = self._num_wanted.pop(request_id, 0)
        if 0 < num_wanted <= self.block_pool.get_num_free_blocks():
            self._fresh[request_id] = self.block_pool.get_new_blocks(num_wanted)
        return blocks

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Let others find the request's blocks, but none behind a cut: what they hold is not what they would be."""
        if request.request_id not in self.num_evicted:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """All blocks of a request that is finished, aborted or preempted: the next time its prompt is whole again."""
        self.num_evicted.pop(request_id, None)
        self._num_wanted.pop(request_id, None)
        self._most_tokens.pop(request_id, None)
        return [*super().pop_blocks_for_free(request_id, *args, **kwargs), *self._fresh.pop(request_id, ())]


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention, managed by `CompressedAttentionManager`."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What one request may need: less than its longest length, where prompts are cut while they are read."""
        whole: int = super().max_memory_usage_bytes(vllm_config)
        settings = find_settings(vllm_config.additional_config)
        if settings is None or settings.chunks is None:
            return whole
        most, kept = settings.most_tokens(vllm_config.model_config.max_model_len)
        num_blocks = cdiv(most, self.block_size) + 1  # one for the answer
        if vllm_config.cache_config.enable_prefix_caching:
            num_blocks += cdiv(kept, self.block_size)
        return int(min(whole, num_blocks * self.page_size_bytes))


# vLLM adds its own entries only while the registry is empty, and at its first use: so before ours
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedAttentionManager, FullAttentionSpec)
