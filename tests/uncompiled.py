"""A compiled step's stand-in, which needs no compiler."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.compiled import package
from compresskv.compiled.step import Step, StepInputs


class UncompiledPackage:
    """A step as PyTorch runs it, line by line."""

    record_s = 0.0

    def __init__(self, model: PreTrainedModel, kinds: tuple[str, ...], *_: Any, **__: Any) -> None:
        self.kinds = kinds
        self._step = Step(model, kinds)
        self._state = package.state_of(model)

    @torch.no_grad()
    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        return self._step(*inputs.as_args())

    def fits(self, model: PreTrainedModel) -> bool:
        return package.state_of(model) == self._state
