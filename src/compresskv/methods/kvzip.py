"""KVzip: a text's tokens are worth what a second reading of the text attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.errors import ConfigError
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.together import RankedTogether

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class KVzip(RankedTogether):
    """The largest attention that a token gets, in a KV head, while the text is repeated; one list for all of them.

    The text is read a second time, in chunks, and what they attend to is noted: reading costs about four prefills, and
    holds the full cache meanwhile. No window is kept: a text is taken to be asked about later. `guaranteed=1` gives
    equal numbers to all KV heads.

    Source: KVzip (arXiv 2505.23416), sections 3.2 and 3.3. Differs: no instruction to repeat precedes the text.
    """

    name = "kvzip"
    summary = "what a second reading of the text attends to; all KV heads share"
    source = "arXiv 2505.23416"
    replays = True
    limits = ranges(lookahead=Range(0, 0, why="the text is read twice before anything follows it"))

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T).

        Raises:
            ConfigError: the text was not replayed.
        """
        if inputs.replayed is None:
            raise ConfigError(f"method {self.name!r} reads the text twice: make a plan (make_plan), or use ask")
        return inputs.replayed.clone()
