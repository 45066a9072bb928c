"""The method's profile for the model that vLLM serves."""

from pathlib import Path
from typing import Any

from compresskv.errors import ModelError, ProfileError
from compresskv.methods.base import Method
from compresskv.serving.settings import Settings
from compresskv.system.paths import is_folder


def check_profile_files(settings: Settings, model_config: Any, download_dir: str | None) -> None:
    """Refuse a missing profile before the model is loaded, as far as the files that are here tell.

    Raises:
        ProfileError, ModelError: as `with_profile`; of a model that vLLM has yet to fetch, or a part of it, only for
            a bad profile: the worker looks again.
    """
    if not any(method.needs_profile for method in _methods(settings)):
        return
    from compresskv.models.checkpoint import is_complete
    from compresskv.profiles.profile import read_profile

    if settings.profile is not None:
        read_profile(settings.profile)
    try:
        folder = _folder(model_config, download_dir)
    except ModelError:
        return
    if is_folder(model_config.model) or is_complete(folder):
        with_profile(settings, model_config, download_dir)


def _methods(settings: Settings) -> list[Method]:
    """For prompts and, where it is cut, for what is generated."""
    return [settings.bare_method()] + ([] if settings.decode is None else [settings.bare_decode_method()])


def with_profile(settings: Settings, model_config: Any, download_dir: str | None) -> list[Method]:
    """The method of prompts and, where there is one, that of what is generated; with the profile where one is needed.

    That is the given file, or the one that fits the checkpoint.

    Args:
        model_config: vLLM's ModelConfig; the model lies in a folder or in the hub's cache.
        download_dir: vLLM's --download-dir, in the place of the hub's cache.
    Raises:
        ProfileError: no profile of this model, or one of another model.
        ModelError: the checkpoint cannot be read.
    """
    methods = _methods(settings)
    if not any(method.needs_profile for method in methods):
        return methods
    from compresskv.models.checkpoint import checkpoint_fingerprint
    from compresskv.profiles.profile import Profile, read_profile
    from compresskv.profiles.store import profile_for

    own = checkpoint_fingerprint(_folder(model_config, download_dir))
    given: Profile | None = None if settings.profile is None else read_profile(settings.profile)
    if own.weights is None and given is None:
        raise ProfileError(
            f"no profile can be found by the files of {model_config.model}, which hold no safetensors, "
            "or other tensors than transformers' own: give one with --profile FILE or COMPRESSKV_PROFILE"
        )
    found = profile_for(own, model_config.model, given, for_method=True)
    return [method.with_profile(found) if method.needs_profile else method for method in methods]


def _folder(model_config: Any, download_dir: str | None) -> Path:
    folder = Path(model_config.model)
    if is_folder(folder):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_config.model, revision=model_config.revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ModelError(f"the files of {model_config.model} are not here: its profile cannot be found") from error
