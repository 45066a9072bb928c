"""Learning what a second reading of a text attends to, so that it can be forecast after the first one."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from compresskv.models.rotary import Rotations
from compresskv.plans.capture import CapturedPrompt
from compresskv.profiles.packing import packed
from compresskv.selection.forecast import Regression, replay_features
from compresskv.system.progress import Progress

_NUM_SINKS = 4
"""First tokens, which are kept anyway and whose keys and values are unlike all others."""


@torch.no_grad()
def fit_replays(model: PreTrainedModel, prompts: Sequence[Sequence[int]], on_progress: Progress) -> tuple[str, ...]:
    """Read each prompt twice, and fit each KV head's attention to what its keys and values are; inside `routing`.

    Returns: for `Profile.replay_weights`.
    """
    rotations, regressions = Rotations(model), dict[int, Regression]()
    for done, token_ids in enumerate(prompts):
        captured = CapturedPrompt(model, 1)
        captured.read(token_ids)
        on_progress("what a second reading attends to", (done + 0.5) / len(prompts))
        positions = torch.arange(len(token_ids))
        for layer, replayed in zip(captured.cache.routed, captured.replayed, strict=True):
            keys, values = (states[0] for states in layer.stored())
            rotation = rotations.of(layer.layer_idx, len(token_ids), keys.device)
            if rotation is not None:
                keys = rotation.undone(keys, positions.to(keys.device))
            features = replay_features(keys, values)[:, _NUM_SINKS:]
            regressions.setdefault(layer.layer_idx, Regression()).add(features, replayed[0, :, _NUM_SINKS:])
        on_progress("what a second reading attends to", (done + 1) / len(prompts))
    return tuple(packed(one.solve().flatten().tolist()) for one in regressions.values())
