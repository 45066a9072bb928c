"""Which models' decode steps can be compiled or recorded."""

from transformers import PreTrainedModel

from compresskv.models.place import input_device, is_offloaded
from compresskv.models.quantize import quantised_by

_CAPTURING = "transformers.utils.output_capturing"


class NotCompilableError(Exception):
    """Why a decode step runs without being compiled: one line that follows 'decoding is not compiled: '."""


def check_compilable(model: PreTrainedModel, *, recorded: bool) -> None:
    """Refuse a model of which no step can be made.

    Args:
        recorded: whether steps are recorded (CUDA graphs), not compiled.
    Raises:
        NotCompilableError: it cannot.
    """
    device = input_device(model)
    if device.type not in ("cpu", "cuda"):
        raise NotCompilableError(f"compiled steps are made for CPUs and CUDA, and the model is on {device}")
    if has_hooks(model):
        raise NotCompilableError("hooks are set on the model's modules, which it would not call")
    if is_offloaded(model):
        raise NotCompilableError("its weights are offloaded, and lie elsewhere from token to token")
    if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) > 1:
        raise NotCompilableError("the model lies on several devices")
    if not recorded and (kind := quantised_by(model)) is not None:
        raise NotCompilableError(f"it cannot read weights that are quantised by {kind}")


def has_hooks(model: PreTrainedModel) -> bool:
    """Whether calling one of its modules does more than the module itself says.

    transformers leaves hooks behind for good when a model's attentions or hidden states are asked for once; without
    being asked again they do nothing.
    """
    return any(
        getattr(hook, "__module__", None) != _CAPTURING
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )
