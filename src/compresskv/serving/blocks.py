"""Blocks of requests whose prompt was cut: how many they need, and how the others are given back."""

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from compresskv.serving.settings import EvictionSpec
from compresskv.serving.versions import check_hooks

check_hooks(FullAttentionManager)


class CompressedAttentionManager(FullAttentionManager):
    """Counts a request's tokens without those that were evicted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        """For each request whose prompt was cut, the tokens that are gone."""
        self._num_wanted: dict[str, int] = {}
        self._fresh: dict[str, list[Any]] = {}

    def has_room(self, spec: EvictionSpec) -> bool:
        """Whether the whole pool has room for the prompt and what is retained beside it: else it would wait for ever.

        Without prefix caching, what is retained stays in the prompt's own blocks.
        """
        if not self.enable_caching:
            return True
        num_needed = cdiv(spec.num_prompt, self.block_size) + cdiv(spec.num_kept, self.block_size)
        return bool(num_needed < self.block_pool.num_gpu_blocks)  # one is vLLM's own

    def prepare(self, request_id: str, spec: EvictionSpec | None) -> None:
        """Say before each allocation whether the request's prompt is cut in this very step; None: it is not.

        With prefix caching, the prompt's blocks may be others' too, and stay cached as they are: what is retained moves
        to fresh blocks, which are allocated together with those of the prompt's last chunk.
        """
        self._num_wanted.pop(request_id, None)
        if spec is not None and self.enable_caching:
            self._num_wanted[request_id] = cdiv(spec.num_kept, self.block_size)

    def evict(self, request_id: str, spec: EvictionSpec) -> tuple[list[int], int] | None:
        """Give back the blocks that are not needed for the retained tokens.

        Returns: the blocks that the retained tokens move to, and how many more are free for others than without the
            cut: those that other requests share are not, and none may be, where most are shared. None, and nothing is
            given back, where there are no blocks to move to.
        """
        blocks, num_free = self.req_to_blocks[request_id], self.block_pool.get_num_free_blocks()
        num_held = cdiv(spec.num_kept, self.block_size)
        if self.enable_caching:
            kept, freed, num_fresh = self._fresh.pop(request_id, []), list(blocks), num_held
        else:
            kept, freed, num_fresh = blocks[:num_held], blocks[num_held:], 0
        if not kept:
            return None
        blocks[:] = kept
        self.num_evicted[request_id] = spec.num_evicted
        self.block_pool.free_blocks(reversed(freed))
        num_freed = self.block_pool.get_num_free_blocks() - num_free - num_fresh
        return [block.block_id for block in kept], max(0, num_freed)

    def keep(self, request_id: str) -> None:
        """Give back what was allocated for a cut that is not made after all."""
        self.block_pool.free_blocks(self._fresh.pop(request_id, ()))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that are missing for `num_tokens` tokens, the evicted ones among them."""
        num_missing: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens - self.num_evicted.get(request_id, 0), *args, **kwargs
        )
        # Admission asks for the whole request's blocks; the allocation itself asks again, for this step's.
        return num_missing + (0 if kwargs.get("apply_admission_cap") else self._num_wanted.get(request_id, 0))

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
        return [*super().pop_blocks_for_free(request_id, *args, **kwargs), *self._fresh.pop(request_id, ())]


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention, managed by `CompressedAttentionManager`."""


# vLLM adds its own entries only while the registry is empty, and at its first use: so before ours
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedAttentionManager, FullAttentionSpec)
