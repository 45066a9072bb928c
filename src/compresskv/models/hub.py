"""Whether the hub can be reached: its client would try again for half a minute before it says that it cannot."""

_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError"}
"""The client's errors, of whichever library it is built on, where nobody answered."""


def is_reachable(repository: str, file: str = "config.json", kind: str = "model") -> bool:
    """Whether the hub answers, be it with an error, asked once. What is in its cache is not asked for.

    Args:
        file, kind: what is looked for there: one that a 'model', or a 'dataset', cannot do without.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(repository, file, repo_type=kind), str):
            return True
        get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind))
    except HFValidationError:
        return True  # no id at all, which is told elsewhere
    except Exception as error:  # noqa: BLE001 - of any library; what the hub says is told by who wants the model
        return not _has_no_connection(error)
    return True


def _has_no_connection(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if _NO_CONNECTION & {kind.__name__ for kind in type(cause).__mro__}:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
