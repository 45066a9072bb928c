"""What eviction costs."""

from contextlib import AbstractContextManager

import torch

from compresskv.system.clock import Stopwatch


class EvictionTimer:
    """Times what one cache does when its layers are cut: an `EvictionObserver`."""

    def __init__(self, *devices: torch.device) -> None:
        self.eviction = Stopwatch(*devices)
        """Scoring, selecting, and moving what stays."""
        self.scoring = Stopwatch(*devices)
        """The method's scores, and budgets that it makes of them."""

    def evicting(self) -> AbstractContextManager[None]:
        """Around the end of a layer's prompt."""
        return self.eviction.running()

    def scoring_tokens(self) -> AbstractContextManager[None]:
        """Around what the method computes."""
        return self.scoring.running()
