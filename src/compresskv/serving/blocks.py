"""Blocks of requests whose prompt was cut: how many they need, and how the others are given back."""

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from compresskv.errors import CacheStateError
from compresskv.serving.settings import Cut
from compresskv.serving.versions import check_signature

# the names of the overridden functions' arguments, as vLLM calls them
check_signature(
    FullAttentionManager.get_num_blocks_to_allocate,
    *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens"),
    *("num_tokens_main_model", "apply_admission_cap", "prefill_end"),
)
check_signature(FullAttentionManager.allocate_new_blocks, "self", "request_id", "num_tokens", "num_tokens_main_model")
check_signature(
    FullAttentionManager.cache_blocks, "self", "request", "num_tokens", "retention_interval", "replay_boundaries"
)
check_signature(FullAttentionManager.pop_blocks_for_free, "self", "request_id")


class CompressedAttentionManager(FullAttentionManager):
    """Counts a request's tokens without those that were evicted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        """For each request whose prompt was cut, the tokens that are gone."""
        self._num_wanted: dict[str, int] = {}
        self._fresh: dict[str, list[Any]] = {}

    def prepare(self, request_id: str, cut: Cut | None) -> None:
        """Say before each allocation whether the request's prompt is cut in this very step; None: it is not.

        With prefix caching, the prompt's blocks may be others' too, and stay cached as they are: what is retained moves
        to fresh blocks, which are allocated together with those of the prompt's last chunk.
        """
        self._num_wanted.pop(request_id, None)
        if cut is not None and self.enable_caching:
            self._num_wanted[request_id] = cdiv(cut.num_kept, self.block_size)

    def evict(self, request_id: str, cut: Cut) -> tuple[list[int], int]:
        """Give back the blocks that are not needed for the retained tokens.

        Returns: the blocks that the retained tokens move to, and how many more are free for others than without the
            cut. Those that other requests share are not, and none may be, where most are shared.
        """
        blocks, num_free, num_fresh = self.req_to_blocks[request_id], self.block_pool.get_num_free_blocks(), 0
        if self.enable_caching:
            if request_id not in self._fresh:
                raise CacheStateError(f"request {request_id} is cut in a step for which it has no fresh blocks")
            freed, blocks[:] = list(blocks), self._fresh.pop(request_id)
            num_fresh = len(blocks)
        else:
            num_held = cdiv(cut.num_kept, self.block_size)
            freed = blocks[num_held:]
            del blocks[num_held:]
        self.num_evicted[request_id] = cut.num_evicted
        self.block_pool.free_blocks(reversed(freed))
        num_freed = self.block_pool.get_num_free_blocks() - num_free - num_fresh
        return [block.block_id for block in blocks], max(0, num_freed)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that are missing for `num_tokens` tokens, the evicted ones among them."""
        num_missing: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens - self.num_evicted.get(request_id, 0), *args, **kwargs
        )
        # Admission asks for the whole request's blocks; the allocation itself asks again, for this step's.
        return num_missing + (0 if kwargs.get("apply_admission_cap") else self._num_wanted.get(request_id, 0))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """The blocks that were missing."""
        gone = self.num_evicted.get(request_id, 0)
        blocks = super().allocate_new_blocks(request_id, num_tokens - gone, num_tokens_main_model - gone)
        if num_wanted := self._num_wanted.pop(request_id, 0):
            self._fresh[request_id] = self.block_pool.get_new_blocks(num_wanted)
        return blocks

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Let others find the request's blocks, but none behind a cut: what they hold is not what they would be."""
        if request.request_id not in self.num_evicted:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """All blocks of a request that is finished, aborted or preempted: the next time its prompt is whole again."""
        self.num_evicted.pop(request_id, None)
        self._num_wanted.pop(request_id, None)
        return [*super().pop_blocks_for_free(request_id), *self._fresh.pop(request_id, ())]


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention, managed by `CompressedAttentionManager`."""


# vLLM adds its own entries only while the registry is empty, and at its first use: so before ours
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedAttentionManager, FullAttentionSpec)
