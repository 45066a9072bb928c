"""Where a model comes from: the embedded default, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv import defaults
from compresskv.errors import CompressKVError, ConfigError, ModelError, first_line
from compresskv.models.embedded import EMBEDDED, ensure_embedded, nearest_embedded
from compresskv.models.gguf import check_weights, load_gguf
from compresskv.models.hub import is_reachable
from compresskv.system.check import check_callbacks
from compresskv.system.paths import home_path, is_file, is_folder, why_unseen
from compresskv.system.progress import Progress, silent
from compresskv.system.quiet import hush_torchao, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_TOKENIZER = "it comes without a tokenizer; add its tokenizer.json"


def load(
    spec: str | Path = defaults.MODEL,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model ready to generate (eval mode, gradients off) and its tokenizer.

    Its attention is sdpa, or eager where its class cannot use that. A model of images and text is loaded as such.

    Args:
        spec: an embedded model's name, a folder, a `.gguf` file, or a hub id such as `org/name`.
        dtype: `None` or "auto" is the checkpoint's own, and bfloat16 for a `.gguf` file; float32 in place of either on
            a CPU that has no instructions for it, if memory holds it. "int8" stores the weights of the linear layers
            in 8 bits (`quantize_int8`).
        device: `None` is the first CUDA device where there is one, else the CPU.
        on_progress: called with a message, and with the fraction done (0 to 1) where one is known.
    Raises:
        ConfigError: the dtype or the device cannot be used.
        ModelError: the model is not found, damaged, not a decoder-only language model, or too large.
    """
    hush_torchao()
    if quantized := dtype == "int8":
        from compresskv.models.quantize import check_int8

        check_int8()
        dtype = None
    check_callbacks(on_progress=on_progress)
    if not isinstance(spec, (str, Path)):
        raise ModelError("must be a name, a folder, a .gguf file or a hub id", option="model", value=spec)
    spec = str(spec)
    wanted, place = torch_dtype(dtype), torch_device(device)
    path = _locate(spec)
    if path is None and spec in EMBEDDED:
        path = ensure_embedded(spec, on_progress)
    if on_progress is not None:
        on_progress(f"loading {spec}", None)
    model: Any
    with _explained(spec):
        if path is not None and is_file(path):
            model, tokenizer = load_gguf(path, wanted, spec=spec)
            model.to(place)
        else:
            model, tokenizer = _load_checkpoint(spec, path, wanted, place, on_progress or silent)
    model.config._name_or_path = spec  # an embedded model's folder would mean nothing to its user
    model.eval().requires_grad_(False)
    if wanted is None:
        from compresskv.models.dtype import use_quick_dtype

        use_quick_dtype(model)
    if quantized:
        from compresskv.models.quantize import quantize_int8

        quantize_int8(model)
    return model, tokenizer


def _locate(spec: str) -> Path | None:
    """The folder or GGUF file that the spec names; `None` for an embedded name and for a hub id.

    Raises:
        ModelError: the spec can only be a path or an embedded name, and is neither.
    """
    if spec in EMBEDDED:
        return None
    if not spec.strip():
        raise ModelError("is empty; pass a name, a folder, a .gguf file or a hub id", option="model", value=spec)
    path = home_path(spec)
    if (why := why_unseen(path)) is not None:
        raise _error(spec, why)
    if is_folder(path):
        return path
    is_gguf = path.suffix.lower() == ".gguf"
    if is_file(path):
        if not is_gguf:
            raise _error(spec, "a file must be a .gguf file; for safetensors pass their folder")
        return path
    looks_like_path = spec.startswith((".", "~")) or path.is_absolute() or spec.count("/") > 1 or "\\" in spec
    if is_gguf or looks_like_path:
        raise _error(spec, f"no such file or folder{nearest_embedded(spec)}")
    if "/" not in spec and nearest_embedded(spec):
        raise _error(spec, f"no such model, file or folder{nearest_embedded(spec)}")
    return None


def _load_checkpoint(
    spec: str, folder: Path | None, dtype: torch.dtype | None, device: torch.device, on_progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder or, where that is `None`, from the hub."""
    from transformers import AutoConfig, AutoTokenizer

    if folder is not None:
        _check_folder(spec, folder)
    name = spec if folder is None else str(folder)
    # False, not the default: that asks on the terminal whether a checkpoint's own code may run.
    source: dict[str, Any] = {"trust_remote_code": False}
    with quiet(downloads=folder is None, on_retry=lambda retry: on_progress(retry, None)):
        source["local_files_only"] = folder is not None or not is_reachable(spec)
        config = AutoConfig.from_pretrained(name, **source)
        if getattr(config, "is_encoder_decoder", False):
            kind = config.model_type
            raise _error(spec, f"{kind} is an encoder-decoder model; pass a decoder-only one")
        _check_quantisation(spec, config)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some releases make one out of nothing
            raise _error(spec, _NO_TOKENIZER)
        model, report = _model_class(config).from_pretrained(
            name,
            **source,
            dtype="auto" if dtype is None else dtype,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    check_weights(spec, report)
    return model, tokenizer


def _check_quantisation(spec: str, config: Any) -> None:
    """Refuse weights that are quantised in a way that transformers does not know: it would read them as they lie.

    Raises:
        ModelError: naming the way.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    given = getattr(config, "quantization_config", None)
    if isinstance(given, dict) and not AutoHfQuantizer.supports_quant_method(given):
        way = given.get("quant_method")
        raise _error(spec, f"its weights are quantised as {way!r}, which this transformers does not know")


def _model_class(config: Any) -> Any:
    """transformers' class for a config: of causal language models or, where there is none, of images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text: Any = AutoModelForCausalLM
    images: Any = AutoModelForImageTextToText
    return images if type(config) in images._model_mapping and type(config) not in text._model_mapping else text


def _check_folder(spec: str, folder: Path) -> None:
    if not is_file(folder / "config.json"):
        found = sorted(folder.glob("*.gguf"))
        hint = f"for its GGUF file pass {found[0]}" if found else "pass a folder that a model was saved to"
        raise _error(spec, f"this folder has no config.json; {hint}")


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that `load` is asked for; None for None and "auto".

    Raises:
        ConfigError: no such dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):  # 8 bits are no dtype to compute in
        raise ConfigError("is no dtype; pass auto, bfloat16, float16, float32 or int8", option="dtype", value=dtype)
    return found


def torch_device(device: str | torch.device | None) -> torch.device:
    """The device that `load` is asked for; None is the first CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: it cannot be used.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()  # what is on the device 'meta' has no numbers
    except Exception as err:  # RuntimeError, AssertionError or another, by the device's backend
        usable = ", ".join(_devices())
        raise ConfigError(
            f"cannot be used on this machine: choose from {usable}", option="device", value=device
        ) from err
    return found


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    others = {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    return ["cpu", *(["cuda"] if gpus else []), *gpus, *(name for name, is_there in others.items() if is_there)]


_OF_MODELS = ("config", "named_modules", "dtype", "device", "num_parameters", "get_input_embeddings")
"""What transformers' models have, and what wraps one whole; a bare `nn.Module` around one has not."""


def check_model(model: Any, tokenizer: Any = callable) -> None:
    """Refuse what is no model and tokenizer of transformers, such as a name that is yet to be loaded.

    Raises:
        ModelError: naming the one that is not.
    """
    if not (callable(model) and all(hasattr(model, name) for name in _OF_MODELS)):
        raise ModelError("must be a transformers model, as `load` returns", option="model", value=_brief(model))
    if not callable(tokenizer):
        raise ModelError("must be a tokenizer, as `load` returns", option="tokenizer", value=_brief(tokenizer))


def _brief(value: Any) -> object:
    return value if value is None or isinstance(value, (str, int, float, Path)) else type(value).__name__


def _error(spec: str, problem: str) -> ModelError:
    return ModelError(f": {problem}", option="model", value=spec)


@contextlib.contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turn whatever transformers, the hub or safetensors raise into a ModelError of one line."""
    try:
        yield
    except CompressKVError:
        raise
    except Exception as err:
        raise _error(spec, _explanation(spec, err)) from err


def _explanation(spec: str, err: Exception) -> str:
    """What went wrong and what to do, from the whole chain: transformers wraps the telling exception."""
    chain: list[BaseException] = [err]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for kinds, meaning in _meanings(spec, err):
        if any(isinstance(error, kinds) for error in chain):
            return meaning
    if "Unrecognized configuration class" in str(err):
        return "not a language model that generates text; pass a decoder-only one"
    if "Couldn't instantiate the backend tokenizer" in str(err):
        return _NO_TOKENIZER
    return f"it cannot be loaded ({first_line(err)})"


def _meanings(spec: str, err: Exception) -> list[tuple[tuple[type[BaseException], ...], str]]:
    """What each kind of exception means for the user; the first that fits counts, so the narrower come first."""
    import torch
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    return [
        ((hub.GatedRepoError,), "a gated hub model; accept its terms there, run `hf auth login`, and try again"),
        (
            (hub.RepositoryNotFoundError, hub.HFValidationError),
            "no such folder, and no such model on the hub; "
            f"check the spelling, or for a private model run `hf auth login`{nearest_embedded(spec)}",
        ),
        (
            (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError),
            "no such folder, the hub cannot be reached, and its cache lacks the model; "
            f"check the spelling and the network, or pass a folder{nearest_embedded(spec)}",
        ),
        ((hub.HfHubHTTPError,), "the hub answered with an error; try again later, or pass a folder"),
        ((SafetensorError,), f"its safetensors are damaged ({first_line(err)}); fetch it again"),
        ((torch.OutOfMemoryError, MemoryError), "it does not fit into memory; pass a smaller model or dtype"),
    ]
