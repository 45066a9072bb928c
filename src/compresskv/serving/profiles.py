"""The method's profile for the model that vLLM serves."""

from pathlib import Path
from typing import Any

from compresskv.errors import ProfileError
from compresskv.method import Method
from compresskv.serving.settings import Settings


def with_profile(settings: Settings, model_config: Any) -> Method:
    """The method, with its profile where it needs one: the given file, or the one that fits the checkpoint.

    Args:
        model_config: vLLM's ModelConfig; the model lies in a folder or in the hub's cache.
    Raises:
        ProfileError: no profile of this model, or one of another model.
        ModelError: the checkpoint cannot be read.
    """
    method = settings.bare_method()
    if not method.needs_profile:
        return method
    from compresskv.profiles.checkpoint import checkpoint_fingerprint
    from compresskv.profiles.profile import Profile, read_profile
    from compresskv.profiles.store import profile_for

    own = checkpoint_fingerprint(_folder(model_config))
    given: Profile | None = None if settings.profile is None else read_profile(settings.profile)
    if own.weights is None and given is None:
        raise ProfileError(
            f"no profile can be found by the files of {model_config.model}, which hold other tensors than "
            "transformers' own: give one with --profile FILE or COMPRESSKV_PROFILE"
        )
    return method.with_profile(profile_for(own, model_config.model, given))


def _folder(model_config: Any) -> Path:
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
