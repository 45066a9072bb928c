"""Where a model computes and where its weights lie, which accelerate may keep apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compresskv.errors import ModelError
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go: to its weights or, where those are offloaded, to where they are brought."""
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return model.device


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """All devices that a model computes on: those of its weights, and those that offloaded ones are brought to."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta}
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                found.add(torch.device(hook.execution_device))
    return tuple(sorted(found, key=str))


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether accelerate brings weights to where they are used, from elsewhere."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def weight_of(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter, read from where accelerate offloaded it to.

    Raises:
        ModelError: its data is nowhere.
    """
    weight = model.get_parameter(name)
    if not weight.is_meta:
        return weight
    path = name.split(".")
    rest: list[str] = []
    while path:
        rest.insert(0, path.pop())
        for hook in _hooks(model.get_submodule(".".join(path))):
            weights: Any = getattr(hook, "weights_map", None)
            if weights is not None:
                found: Tensor = weights[".".join(rest)]
                return found
    raise ModelError(f"weight {name} is not loaded: a profile needs all of the model")


def _hooks(module: nn.Module) -> Iterator[Any]:
    """What accelerate has set on a module: one hook, or several in one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", [hook])
