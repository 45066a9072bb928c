"""Compiled decode steps on disk: built once for a model's shape on a machine, loaded in a second ever after."""

import contextlib
import hashlib
import json
import platform
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.routing import base_implementation, routing
from compresskv.compiled.compilable import NotCompilableError
from compresskv.compiled.export import example_inputs, export_step, find_compiler
from compresskv.compiled.narrow import narrow_weights
from compresskv.compiled.step import Step, StepInputs, narrow_names
from compresskv.errors import first_line
from compresskv.models.shape import decoder_config
from compresskv.system.clock import now
from compresskv.system.files import make_folder, write_text
from compresskv.system.locking import held_if_free, locked
from compresskv.system.paths import cache_dir
from compresskv.system.processor import instruction_sets, processor_name
from compresskv.system.progress import Progress, silent
from compresskv.version import __version__

_NOT_BUILT = (
    "it was not compiled before for this model, dtype, number of threads, kind of method and store: "
    "'compresskv compile' does that"
)
_PROGRAM, _CONSTANTS, _FACTS = "step.pt2", "constants.pt", "facts.json"
_TRACED = ("compiled", "attention", "cache/stores")
"""Rooms whose code is compiled into a step, or fits it."""
_HOOKS_INSTALLED = "_output_capturing_hooks_installed"
"""transformers' note that it was asked for attentions or hidden states once, which changes nothing."""
_IMPORTS_S = 1.0
"""What the first load of a process takes beside the file itself, about: whoever has just built one has paid it."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of the largest logit. Both are roundings of the same sums, in other orders."""
_EXAMPLES = 8
"""A step may magnify what rounding does: of eight examples of SmolLM2's in bfloat16, the worst differs by 9 to 26 %.
What is wrong is wrong in all."""


@dataclass(frozen=True)
class BuildTimes:
    """What is known of a package."""

    compile_s: float
    """Seconds that building it took."""
    load_s: float
    """Seconds that loading it takes in a process that has loaded none before."""


class Package:
    """A compiled `Step` with a model's weights, which stay where they are.

    Copied are only those in float32 that fit into 16 bits, once for all of a model's packages.
    """

    record_s = 0.0
    """It needs no preparation."""

    def __init__(self, folder: Path, model: PreTrainedModel, kinds: tuple[str, ...]) -> None:
        """Load it.

        Raises:
            NotCompilableError: the files are damaged.
        """
        self.kinds = kinds
        self._state, self._narrow = state_of(model), narrow_weights(model)
        copies = self._narrow.copies(model)
        narrow = {own: copies[name] for own, name in narrow_names(copies).items()}
        try:
            self._program: Any = torch._inductor.aoti_load_package(str(folder / _PROGRAM))
            constants = torch.load(folder / _CONSTANTS, weights_only=True) | _tensors(model) | narrow
            self._constants = {name: constants[name] for name in self._program.get_constant_fqns()}
            self._program.load_constants(self._constants, check_full_update=True, user_managed=True)
        except Exception as error:  # damaged files raise of all kinds
            reason = f"the compiled step in {str(folder)!r} cannot be loaded ({first_line(error)}): delete that folder"
            raise NotCompilableError(reason) from error

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        """As `Step.forward`."""
        logits, sliding = self._program(*inputs.as_args())
        return logits, sliding

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model is as it was when this was loaded: it may have been moved, converted, or given adapters."""
        return state_of(model) == self._state and self._narrow.fits(model)


def package_folder(model: PreTrainedModel, kinds: tuple[str, ...]) -> Path:
    """Where this model's package lies, or would.

    Its name hashes everything that compiled code depends on: the model's class, config and tensors' shapes, the kinds
    of its layers, versions, the processor and the number of threads.
    """
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    own = Path(__file__).parent
    what = [
        json.dumps(config, sort_keys=True, default=str),
        _settings(model),
        base_implementation(model),
        _layout(model),
        sorted((name, str(dtype)) for name, dtype in narrow_weights(model).dtypes.items()),
        kinds,
        [torch.__version__, transformers.__version__, platform.python_version(), __version__],
        [platform.machine(), processor_name(), instruction_sets(), torch.backends.cpu.get_cpu_capability()],
        [str(model.device), torch.get_num_threads()],
        [file.read_text() for room in _TRACED for file in sorted((own.parent / room).glob("[!.]*.[cp][py]*"))],
    ]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    return cache_dir() / "compiled" / f"{decoder_config(model).model_type}-{digest}"


def _settings(model: PreTrainedModel) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Of each module: its class, and plain values that its code may read, such as which adapter is active."""
    return [
        (
            name,
            type(module).__qualname__,
            sorted(
                (own, repr(value))
                for own, value in vars(module).items()
                if own != _HOOKS_INSTALLED and _is_plain(value)
            ),
        )
        for name, module in model.named_modules()
    ]


def _is_plain(value: object) -> bool:
    if type(value) in (list, tuple, dict):
        parts: Any = value
        return all(map(_is_plain, [*parts, *parts.values()] if type(value) is dict else parts))
    return type(value) in (bool, int, float, str)


def _layout(model: PreTrainedModel) -> list[Any]:
    """Of each tensor: its type, shape and strides, and which other one it is, where weights are tied."""
    first: dict[int, str] = {}
    return [
        (name, str(tensor.dtype), list(tensor.shape), tensor.stride(), first.setdefault(id(tensor), name))
        for name, tensor in _tensors(model).items()
    ]


def state_of(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """Where each tensor's numbers lie, and how; and what else a step was made of."""
    lying = [
        (name, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        for name, tensor in _tensors(model).items()
    ]
    return lying, _settings(model)


def build_times(model: PreTrainedModel, kinds: tuple[str, ...]) -> BuildTimes | None:
    """What is known of the package; None where there is none."""
    try:
        facts = json.loads((package_folder(model, kinds) / _FACTS).read_text())
        return BuildTimes(compile_s=float(facts["compile_s"]), load_s=float(facts["load_s"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def load_package(
    model: PreTrainedModel, kinds: tuple[str, ...], on_progress: Progress | None = None, *, build: bool = True
) -> Package:
    """The package of a model. Of several processes that need one, one builds it and the others wait.

    Args:
        build: whether to build it where it is missing or damaged.
    Raises:
        NotCompilableError: in one line, why not.
    """
    folder = package_folder(model, kinds)
    if model.dtype not in _TOLERANCE:
        raise NotCompilableError(f"{str(model.dtype).removeprefix('torch.')} is not supported")
    if build_times(model, kinds) is not None:
        try:
            return Package(folder, model, kinds)
        except NotCompilableError:
            if not build:
                raise
    elif not build:
        raise NotCompilableError(_NOT_BUILT)
    try:
        return _build_alone(model, kinds, folder, on_progress or silent)
    except NotCompilableError:
        raise
    except Exception as error:  # whatever a file system, a model's code or a compiler raises
        raise NotCompilableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if "InvalidCxxCompiler" in f"{type(error).__name__}: {error}":  # PyTorch may wrap it
        return "PyTorch finds no C++ compiler: install g++, or another one and name it in the variable CXX"
    if isinstance(error, OSError) and error.filename is not None:
        return f"its decode step cannot be kept in {str(error.filename)!r}: {error.strerror}"
    return f"its decode step cannot be compiled ({first_line(error)})"


def _build_alone(model: PreTrainedModel, kinds: tuple[str, ...], folder: Path, report: Progress) -> Package:
    make_folder(folder.parent)
    _sweep(folder.parent)
    with locked(folder.with_suffix(".lock"), "waiting for another process that compiles the same step", report):
        if build_times(model, kinds) is not None:  # by another process, unless it is damaged
            with contextlib.suppress(NotCompilableError):
                return Package(folder, model, kinds)
        find_compiler()
        report("compiling the decode step, once for this model", None)
        _build(model, kinds, folder)
    return Package(folder, model, kinds)


def _sweep(parent: Path) -> None:
    """Remove what killed builds left, of any step: a running one holds its step's lock."""
    for left in parent.glob(".*.*"):
        folder = parent / left.name[1:].rpartition(".")[0]
        with held_if_free(folder.with_suffix(".lock")) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)


def _build(model: PreTrainedModel, kinds: tuple[str, ...], folder: Path) -> None:
    """Nothing appears under the final name before it is complete and was found to compute the same."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")  # tempfile's would be unreadable to others
    temporary.mkdir()
    try:
        start = now()
        export_step(model, kinds, temporary / _PROGRAM, temporary / _CONSTANTS)
        compiled = now()
        package = Package(temporary, model, kinds)
        facts = BuildTimes(compile_s=compiled - start, load_s=_IMPORTS_S + now() - compiled)
        _check(package, model, kinds)
        write_text(temporary / _FACTS, json.dumps(asdict(facts)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _check(package: Package, model: PreTrainedModel, kinds: tuple[str, ...]) -> None:
    """Compare a step's logits with those of the same step run by PyTorch.

    Raises:
        NotCompilableError: they differ by more than rounding does.
    """
    for example in range(_EXAMPLES):
        with routing(model):
            expected, _ = Step(model, kinds)(*example_inputs(model, kinds, example).as_args())
        found, _ = package(example_inputs(model, kinds, example))
        error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        if error <= _TOLERANCE[expected.dtype]:  # NaN is none
            return
    raise NotCompilableError(f"the compiled step's logits are wrong by {error:.1%} of the largest")


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights and buffers, by their names in `Step`."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {f"model.{name}": tensor for name, tensor in named}
