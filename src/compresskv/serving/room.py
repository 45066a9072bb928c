"""Memory that eviction needs beside vLLM's own, bounded and set aside: a pool filled to the brim leaves no other."""

from dataclasses import dataclass
from typing import Any

SCRATCH_NBYTES = 64 << 20
"""What a worker may take for scoring and moving, however long prompts are (see `scratch_nbytes`)."""
_OBSERVED_NBYTES = SCRATCH_NBYTES // 2  # what layers tell of the prompts that a step ends, until all have been read
WORK_NBYTES = SCRATCH_NBYTES // 2  # what is worked on at once: one layer's scoring, or a piece of what is moved
_OBSERVED_PER_TOKEN = 8  # a vote and a score in float32, of each layer
_SHORTEST = 256  # tokens in a piece; shorter ones are all overhead


def max_observed_tokens(model: Any) -> int:
    """Tokens of all prompts that one step may end; a single prompt may be longer.

    Args:
        model: vLLM's ModelConfig.
    """
    return _OBSERVED_NBYTES // (_OBSERVED_PER_TOKEN * int(model.get_total_num_hidden_layers()))


def scratch_nbytes(model: Any) -> int:
    """Bytes to set aside: `SCRATCH_NBYTES` unless one prompt of the longest length needs more.

    That is at 131,072 tokens in 32 layers.
    """
    longest: int = model.max_model_len * model.get_total_num_hidden_layers() * _OBSERVED_PER_TOKEN
    return WORK_NBYTES + max(_OBSERVED_NBYTES, longest)


@dataclass(frozen=True)
class LayerShape:
    """One layer of one rank."""

    num_kv_heads: int
    num_groups: int
    """Query heads that read one KV head."""
    head_size: int
    itemsize: int
    """Bytes of an element of the cache."""
    converted_itemsize: int = 0
    """And of what it is made for attention; 0: it is that already."""

    def moved_at_once(self) -> int:
        """Tokens that are moved in one piece."""
        gathered = 2 * self.num_kv_heads * self.head_size * (self.itemsize + 8)  # an index, where no strides tell
        return max(_SHORTEST, WORK_NBYTES // gathered)

    def scored_at_once(self, num_tokens: int, window_size: int) -> tuple[int, int]:
        """KV heads, of which all have as many, and tokens that are scored in one piece.

        All of them where there is room, and then scores are computed as outside of vLLM, bit by bit.
        """
        for num_heads in range(self.num_kv_heads, 0, -1):
            if self.num_kv_heads % num_heads:
                continue
            whole, by_token = self._nbytes(num_heads, num_tokens, window_size)
            at_once = (WORK_NBYTES - whole) // by_token
            if at_once >= min(num_tokens, 4 * _SHORTEST):
                return num_heads, min(at_once, num_tokens)
        return 1, min(_SHORTEST, num_tokens)

    def _nbytes(self, num_heads: int, num_tokens: int, window_size: int) -> tuple[int, int]:
        """Bytes that scoring some KV heads takes for the whole prompt, and for each token of a piece."""
        num_queries = num_heads * self.num_groups
        whole = num_tokens * 4 * (4 * num_queries + 8)  # mean, variance and what they are made of, and the layer's own
        keys = num_heads * self.head_size * (2 * self.itemsize + self.converted_itemsize)  # as gathered, and by heads
        logits = 3 * 4 * num_queries * max(1, window_size)  # in float32, what they came from, and their softmax
        return whole, keys + logits
