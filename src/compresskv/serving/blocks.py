"""Blocks of requests whose prompt was cut: how many they need, and how the others are given back."""

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from compresskv.serving.settings import Cut
from compresskv.serving.versions import check_signature

# the names of the overridden functions' arguments, as vLLM calls them
check_signature(
    FullAttentionManager.get_num_blocks_to_allocate,
    *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens"),
    *("num_tokens_main_model", "apply_admission_cap", "prefill_end"),
)
check_signature(FullAttentionManager.allocate_new_blocks, "self", "request_id", "num_tokens", "num_tokens_main_model")
check_signature(FullAttentionManager.pop_blocks_for_free, "self", "request_id")


class CompressedAttentionManager(FullAttentionManager):
    """Counts a request's tokens without those that were evicted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        """For each request whose prompt was cut, the tokens that are gone."""

    def evict(self, request_id: str, cut: Cut) -> int:
        """Give the blocks beyond the retained tokens back.

        Returns: how many.
        """
        blocks = self.req_to_blocks[request_id]
        num_held = cdiv(cut.num_kept, self.block_size)
        freed = blocks[num_held:]
        del blocks[num_held:]
        self.num_evicted[request_id] = cut.num_evicted
        self.block_pool.free_blocks(reversed(freed))
        return len(freed)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that are missing for `num_tokens` tokens, the evicted ones among them."""
        return super().get_num_blocks_to_allocate(  # type: ignore[no-any-return]
            request_id, num_tokens - self.num_evicted.get(request_id, 0), *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """The blocks that were missing."""
        gone = self.num_evicted.get(request_id, 0)
        return super().allocate_new_blocks(request_id, num_tokens - gone, num_tokens_main_model - gone)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """All blocks of a request that is finished, aborted or preempted: the next time its prompt is whole again."""
        self.num_evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention, managed by `CompressedAttentionManager`."""


# vLLM adds its own entries only while the registry is empty, and at its first use: so before ours
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedAttentionManager, FullAttentionSpec)
