"""A compiled step is compared with the same step run by PyTorch before it is ever used."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from compresskv.attention.routing import routing
from compresskv.compiled.compilable import NotCompilableError
from compresskv.compiled.package import _check
from compresskv.compiled.step import Step, StepInputs

KINDS = ("even:int8", "ragged", "even:int4", "ragged:int8")


class Program:
    """What stands for compiled code: PyTorch's step, and an error in some of its logits."""

    def __init__(self, model: Any, errors: list[float]) -> None:
        self._step, self.left = Step(model, KINDS), errors
        self._model = model

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        with routing(self._model):
            logits, sliding = self._step(*inputs.as_args())
        return logits + self.left.pop(0) * logits.abs().max(), sliding


def check(errors: list[float]) -> Program:
    model = tiny.tiny_model("llama")
    program: Any = Program(model, errors)
    _check(program, model, KINDS)
    return program


def test_one_example_is_enough_where_it_fits() -> None:
    assert check([1e-5, 1.0]).left == [1.0]


def test_an_example_that_magnifies_rounding_is_no_proof() -> None:
    assert check([0.1, float("nan"), 1e-5]).left == []


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_what_is_wrong_in_every_example_is_refused(error: float) -> None:
    with pytest.raises(NotCompilableError, match=r"logits are wrong by (10\.0|nan)%"), torch.no_grad():
        check([error] * 100)
