"""How many tokens requests have lost, and how many of these were put there: by request, and by rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d


@dataclass(frozen=True)
class ByRow:
    """A number of tokens for each request of a batch."""

    on_host: Tensor
    """(requests,) int32."""
    on_device: Tensor
    """(requests,) int32."""

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> "ByRow | None":
        """None where all are 0."""
        on_host = np.array(counts, dtype=np.int32)
        return cls(torch.from_numpy(on_host), async_tensor_h2d(on_host, device=device)) if on_host.any() else None

    def by_token(self, num_scheduled_tokens: np.ndarray) -> Tensor:
        """(tokens,) int32, on the device: for each token of the step, its request's number."""
        num_tokens = int(num_scheduled_tokens.sum())
        if num_tokens == len(num_scheduled_tokens):  # all decode
            return self.on_device
        repeated = np.repeat(self.on_host.numpy(), num_scheduled_tokens)
        return async_tensor_h2d(repeated, device=self.on_device.device)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LostByRow(ByRow):
    """Tokens that each request of a batch has lost."""

    put: ByRow | None = None
    """How many of them were put into the prompt in front of cuts: by so many, positions are less than vLLM's."""


class EvictedTokens:
    """Of requests whose prompt was cut, until they end or are read again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_request: dict[str, tuple[int, int]] = {}
        self._request_ids: Sequence[str] = ()
        self._by_row: LostByRow | None = None

    def note(self, request_id: str, num_evicted: int, num_put: int = 0) -> None:
        """A prompt was cut.

        Args:
            num_evicted: tokens that it has lost in all.
            num_put: of these, the ones that this cut was made for.
        """
        _, before = self._by_request.get(request_id, (0, 0))
        self._by_request[request_id] = num_evicted, before + num_put
        self._request_ids = ()

    def forget(self, scheduler_output: Any) -> None:
        """What is known of requests that have ended, were preempted and are read again, or have come anew."""
        if not self._by_request:
            return
        again = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        for request_id in (*scheduler_output.finished_req_ids, *again, *new):
            if self._by_request.pop(request_id, None):
                self._request_ids = ()

    def by_row(self, request_ids: Sequence[str]) -> LostByRow | None:
        """Of the requests of a batch; None where none of them was cut. Made anew only where the batch is another."""
        if not self._by_request:
            return None
        if request_ids != self._request_ids:
            self._request_ids = list(request_ids)
            known = [self._by_request.get(request_id, (0, 0)) for request_id in request_ids]
            lost, put = (ByRow.of([counts[place] for counts in known], self._device) for place in (0, 1))
            self._by_row = None if lost is None else LostByRow(lost.on_host, lost.on_device, put)
        return self._by_row
