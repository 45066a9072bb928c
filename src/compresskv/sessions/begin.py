"""Where sessions come from: a document that is read, or a file that is opened."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.attention.support import attention_modules
from compresskv.cache.cache import CompressedCache
from compresskv.cache.costs import tokens_kept
from compresskv.cache.group import check_candidates
from compresskv.cache.state import State, restore_cache
from compresskv.errors import CacheStateError, ConfigError, ProfileError, SessionError
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import create
from compresskv.models.dtype import warn_of_slow_dtype
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import check_model
from compresskv.models.place import devices_of, input_device
from compresskv.models.quantize import weights_dtype
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import resolve_profile
from compresskv.profiles.stores import best_store, sparing_store, warn_of_lossy_store
from compresskv.prompts.turns import first_part
from compresskv.selection.budget_words import BEFOREHAND
from compresskv.selection.budgets import Budget, SharedBudget, known_beforehand, read_budget
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.sessions.facts import Facts
from compresskv.sessions.file import Contents, read_session
from compresskv.sessions.progress import OnRead
from compresskv.sessions.reading import check_length, held_by, read_and_cut
from compresskv.sessions.session import Session
from compresskv.system.check import check_callbacks, check_path
from compresskv.system.clock import now
from compresskv.system.libraries import libraries


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    method: str | Method | None = None,
    budget: Budget = defaults.SESSION_BUDGET,
    profile: Profile | str | Path | None = None,
    store: str | None = None,
    chunk: int | None = None,
    max_memory: int | None = None,
    candidates: int | None = defaults.CANDIDATES,
    name: str | None = None,
    on_read: OnRead | None = None,
    **options: Any,
) -> Session:
    """Read a document once, without knowing what will be asked, and keep a part of its KV cache.

    Args:
        method: as for `compressing`; None: `forecast`, or `kvzip`, which reads the document twice, where the model has
            no profile for it.
        budget, profile, options: as for `compressing`; a share is of the document, or of its full cache's bytes.
        store: as for `compressing`; None: on a CPU, by the model's profile, the one that loses least for a budget in
            bytes, else the one of the fewest bytes that loses next to nothing, or 'int8' where the profile does not
            tell; elsewhere 'native'.
        chunk: tokens to read at a time, to bound what reading needs beside the cache; None: all at once.
        max_memory: bytes that keys and values may take while the document is read: where all of them need more, it is
            read in parts, and each is cut before the next one is read. What is kept is then another choice.
        candidates: as for `compressing`; None: a choice that is exact where a budget is below an eighth of the text.
        name: what the document is called.
        on_read: called with (steps done, steps) meanwhile, a step being one token in one attention layer.
    Raises:
        ConfigError, ProfileError, ModelError: as for `compressing`; or the method looks ahead.
        PromptError: an empty document, or one that does not fit into the model's context.
    """
    check_model(model, tokenizer)
    check_callbacks(on_read=on_read)
    check_candidates(candidates)
    if name is not None and not isinstance(name, str):
        raise ConfigError("must be a text, or None", option="name", value=name)
    part = first_part(tokenizer, text)
    chosen = find_method(model, method, profile, **options)
    budget = known_beforehand(read_budget(budget, BEFOREHAND))
    own = getattr(chosen, "profile", None)
    check_length(model, len(part.input_ids))
    if store is None:
        store = _default_store(model, own, budget, len(part.input_ids))
    else:
        store = find_precision(store).name
        warn_of_lossy_store(own, store)
    warn_of_slow_dtype(model)
    start = now(*devices_of(model))
    held: dict[str, Any] = {"store": store, "chunk": chunk, "max_memory": max_memory, "candidates": candidates}
    cache = read_and_cut(model, part.input_ids, chosen, budget, **held, on_read=on_read)
    facts = Facts(
        model=str(model.config._name_or_path),
        fingerprint=str(fingerprint(model)),
        names=() if name is None else (name,),
        method=chosen.label,
        budget=chosen.told_budget(budget),
        profile=None if own is None else own.digest,
        **held_by(cache, part.input_ids),
        read_s=now(*devices_of(model)) - start,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dtype=weights_dtype(model),
        store=store,
        versions=libraries(),
    )
    return Session(model, tokenizer, cache, part.input_ids, part.ending, facts, chosen)


def _default_store(
    model: PreTrainedModel, profile: Profile | None, budget: SharedBudget | Sequence[int], num_tokens: int
) -> str:
    """By the method's profile or, where the method needs none, by the model's own."""
    if input_device(model).type != "cpu":
        return NATIVE  # there a decode step unpacks each layer whole, which nobody has timed
    if profile is None:
        with suppress(ProfileError):
            profile = resolve_profile(model)
    if not isinstance(budget, str):
        return sparing_store(profile)

    def share_held(store: str) -> float:
        with suppress(ConfigError):  # there is no room for a token
            return tokens_kept(model, budget, num_tokens, store) / num_tokens
        return 0.0

    return best_store(profile, share_held)


def find_method(
    model: PreTrainedModel, method: str | Method | None, profile: Profile | str | Path | None = None, **options: Any
) -> Method:
    """The method with its profile; where none is named, the default for documents whose questions are not known.

    Raises:
        ConfigError, ProfileError: as for `read`.
    """
    first, second = defaults.SESSION_METHODS
    try:
        return prepare_method(model, first if method is None else method, profile, **options)
    except ProfileError:
        if method is not None or profile is not None:
            raise
        return prepare_method(model, second, **options)


def open_session(path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Session:
    """Go on with a saved session: its answers are those that it would have given before.

    Args:
        model, tokenizer: those that it was read with.
    Raises:
        SessionError: no session, a damaged one, one of a newer release, or of another model or tokenizer.
        ModelError: as for `compressing`.
    """
    check_model(model, tokenizer)
    check_path("path", path)
    warn_of_slow_dtype(model)
    return opened(path, read_session(path), model, tokenizer)


def opened(path: str | Path, contents: Contents, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Session:
    """`open_session` of a file whose contents were read before.

    Raises:
        SessionError: they are of another model or tokenizer.
    """
    own = str(fingerprint(model))
    if contents.facts.fingerprint != own:
        raise SessionError(
            f"session {str(path)!r} belongs to another model: it is for {contents.facts.fingerprint}, this is {own}"
        )
    if contents.facts.dtype != weights_dtype(model):
        raise SessionError(
            f"session {str(path)!r} was read in {contents.facts.dtype}, this model is in {weights_dtype(model)}: "
            f"load it with dtype={contents.facts.loaded_dtype}"
        )
    if not contents.ending.is_of(tokenizer):
        raise SessionError(f"session {str(path)!r} was read with another tokenizer")
    try:
        cache = _restored(model, contents.state, contents.facts.store)
        session = Session(model, tokenizer, cache, contents.token_ids, contents.ending, contents.facts)
        if contents.said is not None:
            talk = _restored(model, contents.said.state, contents.facts.store)
            session.resume(talk, contents.said.turns, contents.said.answer)
    except (CacheStateError, KeyError, TypeError, ValueError) as error:
        raise SessionError(f"session {str(path)!r} does not fit this model: {error}") from error
    return session


def _restored(model: PreTrainedModel, state: State, store: str) -> CompressedCache:
    cache = CompressedCache(model, create("full"), 1, store=store)
    restore_cache(cache, _on_devices(state, model))
    return cache


def _on_devices(state: State, model: PreTrainedModel) -> State:
    """Each layer's tensors where its weights are."""
    tensors, layers = state
    places = {
        str(layer_idx): next(module.parameters()).device for layer_idx, (module, *_) in attention_modules(model).items()
    }
    moved = {}
    for name, tensor in tensors.items():
        place = places.get(name.partition(".")[0])
        moved[name] = tensor.to(input_device(model) if place is None or place.type == "meta" else place)
    return moved, layers
