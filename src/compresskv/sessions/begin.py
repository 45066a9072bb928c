"""Where sessions come from: a document that is read, or a file that is opened."""

from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.attention.support import attention_modules
from compresskv.cache.cache import CompressedCache
from compresskv.cache.state import State, restore_cache
from compresskv.errors import CacheStateError, PromptError, SessionError
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import create
from compresskv.models.dtype import warn_of_slow_dtype
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import check_model
from compresskv.models.place import devices_of, input_device
from compresskv.models.quantize import weights_dtype
from compresskv.plans.plan import prompt_digest
from compresskv.profiles.profile import Profile
from compresskv.prompts.prompt import context_length
from compresskv.prompts.turns import first_part
from compresskv.selection.budgets import Budget, as_json, check_budget
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.sessions.facts import Facts
from compresskv.sessions.file import read_session
from compresskv.sessions.reading import OnRead, read_document
from compresskv.sessions.session import Session
from compresskv.system.clock import now

_LEAST_ROOM = 256
"""Tokens that a document must leave of the model's context: for a question and its answer."""


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    method: str | Method = defaults.SESSION_METHOD,
    budget: Budget = defaults.SESSION_BUDGET,
    profile: Profile | str | Path | None = None,
    store: str = NATIVE,
    chunk: int | None = None,
    name: str | None = None,
    on_read: OnRead | None = None,
    **options: Any,
) -> Session:
    """Read a document once, without knowing what will be asked, and keep a part of its KV cache.

    Args:
        method, budget, profile, store, options: as for `compressing`; a share is of the document.
        chunk: tokens to read at a time, to bound what reading needs beside the cache; None: all at once.
        name: what the document is called.
        on_read: called with (steps done, steps) meanwhile.
    Raises:
        ConfigError, ProfileError, ModelError: as for `compressing`; or the method looks ahead.
        PromptError: an empty document, or one that does not fit into the model's context.
    """
    check_model(model, tokenizer)
    part = first_part(tokenizer, text)
    chosen = prepare_method(model, method, profile, **options)
    check_budget(budget)
    find_precision(store)
    warn_of_slow_dtype(model)
    limit = context_length(model)
    if limit is not None and len(part.input_ids) + _LEAST_ROOM > limit:
        raise PromptError(
            f"the document has {len(part.input_ids)} tokens, but of the model's context of {limit}, "
            f"{_LEAST_ROOM} are needed for a question and its answer: shorten it"
        )
    start = now(*devices_of(model))
    cache = read_document(model, part.input_ids, chosen, budget, store=store, chunk=chunk, on_read=on_read)
    own = getattr(chosen, "profile", None)
    facts = Facts(
        model=str(model.config._name_or_path),
        fingerprint=str(fingerprint(model)),
        names=() if name is None else (name,),
        method=chosen.label,
        budget=as_json(budget),
        profile=None if own is None else own.digest,
        num_tokens=len(part.input_ids),
        sha256=prompt_digest(part.input_ids),
        mean_retained=_mean_retained(cache),
        kv_nbytes=cache.retained_nbytes,
        kv_nbytes_full=cache.full_nbytes,
        read_s=now(*devices_of(model)) - start,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dtype=weights_dtype(model),
        store=store,
        versions={package: version(package) for package in ("compresskv", "torch", "transformers")},
    )
    return Session(model, tokenizer, cache, part.input_ids, part.ending, facts)


def _mean_retained(cache: CompressedCache) -> float:
    layers = cache.compressed_layers
    return sum(layer.mean_retained for layer in layers) / len(layers)


def open_session(path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Session:
    """Go on with a saved session: its answers are those that it would have given before.

    Args:
        model, tokenizer: those that it was read with.
    Raises:
        SessionError: no session, a damaged one, one of a newer release, or of another model or tokenizer.
        ModelError: as for `compressing`.
    """
    check_model(model, tokenizer)
    contents = read_session(path)
    own = str(fingerprint(model))
    if contents.facts.fingerprint != own:
        raise SessionError(
            f"session {str(path)!r} belongs to another model: it is for {contents.facts.fingerprint}, this is {own}"
        )
    if contents.facts.dtype != weights_dtype(model):
        raise SessionError(
            f"session {str(path)!r} was read in {contents.facts.dtype}, this model is in {weights_dtype(model)}: "
            f"load it with dtype={contents.facts.dtype}"
        )
    if not contents.ending.is_of(tokenizer):
        raise SessionError(f"session {str(path)!r} was read with another tokenizer")
    try:
        cache = _restored(model, contents.state, contents.facts.store)
        session = Session(model, tokenizer, cache, contents.token_ids, contents.ending, contents.facts)
        if contents.said is not None:
            talk = _restored(model, contents.said.state, contents.facts.store)
            session.resume(talk, contents.said.starts, contents.said.answer)
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
