"""How many tokens requests have lost: by request, and by the rows of a step's batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d


@dataclass(frozen=True)
class LostByRow:
    """Tokens that each request of a batch has lost."""

    on_host: Tensor
    """(requests,) int32."""
    on_device: Tensor
    """(requests,) int32."""

    def by_token(self, num_scheduled_tokens: np.ndarray) -> Tensor:
        """(tokens,) int32, on the device: for each token of the step, what its request has lost."""
        num_tokens = int(num_scheduled_tokens.sum())
        if num_tokens == len(num_scheduled_tokens):  # all decode
            return self.on_device
        lost = np.repeat(self.on_host.numpy(), num_scheduled_tokens)
        return async_tensor_h2d(lost, device=self.on_device.device)  # type: ignore[no-any-return]


class EvictedTokens:
    """Of requests whose prompt was cut, until they end or are read again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_request: dict[str, int] = {}
        self._request_ids: Sequence[str] = ()
        self._by_row: LostByRow | None = None

    def note(self, request_id: str, num_evicted: int) -> None:
        """A prompt was cut."""
        self._by_request[request_id] = num_evicted
        self._request_ids = ()

    def forget(self, scheduler_output: Any) -> None:
        """What is known of requests that have ended, were preempted and are read again, or have come anew."""
        if not self._by_request:
            return
        again = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        for request_id in (*scheduler_output.finished_req_ids, *again, *new):
            if self._by_request.pop(request_id, 0):
                self._request_ids = ()

    def by_row(self, request_ids: Sequence[str]) -> LostByRow | None:
        """Of the requests of a batch; None where none of them was cut. Made anew only where the batch is another."""
        if not self._by_request:
            return None
        if request_ids != self._request_ids:
            self._request_ids = list(request_ids)
            lost = np.array([self._by_request.get(request_id, 0) for request_id in request_ids], dtype=np.int32)
            on_device = async_tensor_h2d(lost, device=self._device)
            self._by_row = LostByRow(torch.from_numpy(lost), on_device) if lost.any() else None
        return self._by_row
