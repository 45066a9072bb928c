"""A session's file: safetensors with JSON beside them, written aside and renamed. Nothing in it is ever executed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from compresskv.cache.state import State
from compresskv.errors import SessionError
from compresskv.prompts.turns import Ending
from compresskv.selection.precision import NATIVE
from compresskv.sessions.facts import Facts
from compresskv.sessions.header import (
    CONVERSATION_VERSION,
    DOCUMENT_VERSION,
    FORMAT,
    VERSION,
    facts_of,
    read_metadata,
    turns_of,
)
from compresskv.sessions.integers import pack, unpack
from compresskv.sessions.repeated import join, part
from compresskv.sessions.turn import Turn
from compresskv.system.convert import Count, convert
from compresskv.system.files import replacing, write_whole
from compresskv.system.paths import exists, is_file

_INTEGERS, _TOKENS, _SAID, _ROWS = "integers", "tokens", "said.", ".rows"
_PACKED = (torch.int64, torch.bool)


@dataclass(frozen=True)
class Contents:
    """All that a session's file holds."""

    facts: Facts
    token_ids: list[int]
    ending: Ending
    state: State
    said: "Said | None" = None


@dataclass(frozen=True)
class Said:
    """A conversation; see `Conversation`."""

    state: State
    turns: tuple[Turn, ...]
    answer: list[int]


@dataclass(frozen=True)
class _Told:
    """What a file's head must tell of the tensors that follow."""

    ending: tuple[str, tuple[Count, ...], str]
    layers: list[dict[str, Any]]
    integers: list[tuple[str, list[Count]]]
    tokens: tuple[list[Count]]
    said: tuple[Any, ...] | None


def write_session(path: str | Path, contents: Contents) -> None:
    """Save atomically: see `replacing`.

    Raises:
        SessionError: the place cannot be written; what was there is there still.
    """
    tensors, layers = contents.state
    said = contents.said
    shapes_said: dict[str, list[int]] = {}
    if said is not None:
        later, shapes_said = _without_repeated(said.state[0], tensors)
        tensors = tensors | {_SAID + name: tensor for name, tensor in later.items()}
    packed = {name: tensor for name, tensor in tensors.items() if tensor.dtype in _PACKED}
    kept = _apart({name: tensor.cpu() for name, tensor in tensors.items() if name not in packed})
    kept[_INTEGERS], shapes = pack(list(packed.values()))
    kept[_TOKENS], token_shapes = pack([torch.tensor(contents.token_ids)])
    told = {
        "facts": contents.facts.to_dict(),
        "ending": [contents.ending.text, list(contents.ending.token_ids), contents.ending.unread],
        "layers": layers,
        "integers": list(zip(packed, shapes, strict=True)),
        "tokens": token_shapes,
        "said": None
        if said is None
        else [said.state[1], [turn.start for turn in said.turns], said.answer, shapes_said],
        "turns": [] if said is None else [asdict(turn) for turn in said.turns],
    }
    text = json.dumps(told)
    metadata = {"format": FORMAT, "version": str(_version(contents)), "session": text, "sha256": _digest(text, kept)}
    try:
        if exists(path) and not is_file(path):
            write_whole(path, save(kept, metadata))  # `save_file` would put a file in the place of a device
        else:
            with replacing(path, is_private=True) as place:
                save_file(kept, place, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SessionError(f"cannot write the session to {str(path)!r}: {reason}") from error


def _version(contents: Contents) -> int:
    """The earliest format that tells all of it."""
    if contents.facts.store != NATIVE:
        return VERSION
    return DOCUMENT_VERSION if contents.said is None and contents.facts.budget is not None else CONVERSATION_VERSION


def read_session(path: str | Path) -> Contents:
    """Load and check a session. The document's keys and values lie in the file, mapped into memory, until they are
    first used; a conversation's are put together.

    Raises:
        SessionError: as for `read_metadata`; or the file is cut short or was altered.
    """
    metadata = read_metadata(path)
    facts = facts_of(path, metadata)
    try:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            text = file.metadata()["session"]
        if _digest(text, held) != metadata["sha256"]:
            raise ValueError("its digest is another")
        told = convert(metadata, _Told)
        names = [name for name, _ in told.integers]
        integers = unpack(held.pop(_INTEGERS), [shape for _, shape in told.integers])
        (token_ids,) = unpack(held.pop(_TOKENS), list(told.tokens))
        tensors = held | dict(zip(names, integers, strict=True))
        later = {name.removeprefix(_SAID): tensors.pop(name) for name in [*tensors] if name.startswith(_SAID)}
        said = None
        if told.said is not None:
            layers, _, answer, *shapes = told.said  # without shapes in format 1
            state = _with_repeated(later, tensors, *(convert(one, dict[str, list[Count]]) for one in shapes))
            turns = turns_of(path, metadata)
            said = Said((state, convert(layers, list[dict[str, Any]])), turns, convert(answer, list[Count]))
        return Contents(facts, token_ids.tolist(), Ending(*told.ending), (tensors, told.layers), said)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # the last: of shapes
        raise SessionError(f"session {str(path)!r} is damaged: it was cut short, or altered ({error})") from error


def _without_repeated(
    later: dict[str, Tensor], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """A conversation's tensors without what they repeat of the document's, and the shapes of those that do."""
    kept, shapes = {}, {}
    for name, tensor in later.items():
        parted = None
        if name in tensors and tensor.dtype not in _PACKED:
            parted = part(tensor.cpu(), tensors[name].cpu())
        if parted is None:
            kept[name] = tensor
        else:
            kept[name + _ROWS], kept[name] = parted
            shapes[name] = list(tensor.shape)
    return kept, shapes


def _with_repeated(
    later: dict[str, Tensor], tensors: dict[str, Tensor], shapes: Mapping[str, list[int]] | None = None
) -> dict[str, Tensor]:
    """The reverse.

    Raises:
        KeyError, ValueError: it does not fit the document's.
    """
    for name, shape in (shapes or {}).items():
        later[name] = join(later.pop(name + _ROWS), later[name], tensors[name], shape)
    return later


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with none in another's storage, as safetensors wants it: a conversation may lie behind its document."""
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    return tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that is held: against damage, not against forgery."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
