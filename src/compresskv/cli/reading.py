"""The parameters that `read` and `chat` share, and how documents become sessions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.kept import check_unused
from compresskv.cli.options import (
    BudgetOption,
    CandidatesOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OfOption,
    ProfileOption,
    SessionMethodOption,
    SettingsOption,
    check_profile,
    create_method,
    parse_candidates,
    parse_nbytes,
)
from compresskv.cli.places import name_of
from compresskv.cli.terminal import Bar
from compresskv.errors import ConfigError
from compresskv.prompts.document import read_document
from compresskv.prompts.request import check_request
from compresskv.selection.budget_words import BEFOREHAND
from compresskv.selection.budgets import TOKENS, known_beforehand, parse_budget
from compresskv.selection.precision import PRECISIONS, find_precision
from compresskv.system.check import check_least

if TYPE_CHECKING:
    from compresskv.methods.base import Method
    from compresskv.sessions.session import Session

ChunkOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens to read at a time, for less memory; the choice stays the same. Default: all at once.",
        metavar="TOKENS",
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Bytes that keys and values may take meanwhile, such as 500MB: longer documents are read in parts, "
        "each cut before the next. Default: all are held until the end.",
        metavar="SIZE",
    ),
]
SessionStoreOption = Annotated[
    str | None,
    typer.Option(
        help=f"In how many bits a number what is kept is held: {', '.join(PRECISIONS)} (docs/stores.md). Default: on a "
        "CPU, by the model's profile, what loses least for the budget's bytes or, for a budget in tokens, the fewest "
        "bits that lose next to nothing; int8 without one; on a GPU, native.",
        metavar="STORE",
    ),
]


@dataclass(frozen=True)
class Reading:
    """How documents are read that are to be asked later; each field is a parameter of the command."""

    model: ModelOption = defaults.MODEL
    method: SessionMethodOption = None
    budget: BudgetOption = defaults.SESSION_BUDGET
    of: OfOption = TOKENS
    store: SessionStoreOption = None
    chunk: ChunkOption = None
    max_memory: MaxMemoryOption = None
    candidates: CandidatesOption = str(defaults.CANDIDATES)
    profile: ProfileOption = None
    settings: SettingsOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None

    def check_session(self) -> None:
        """Refuse what says how a document is to be read, where it was read before.

        Raises:
            ConfigError: naming it.
        """
        own = ("model", "dtype", "device")
        check_unused(**{field.name: getattr(self, field.name) for field in fields(self) if field.name not in own})

    def checked(self, documents: Sequence[str]) -> "CheckedDocuments":
        """The documents, the method and the budget.

        Raises:
            CompressKVError: anything that can be found wrong without the model.
        """
        method, budget = self._method(), known_beforehand(parse_budget(self.budget, self.of, BEFOREHAND))
        if self.store is not None:
            find_precision(self.store)
        check_least("chunk", self.chunk)
        max_memory = None if self.max_memory is None else parse_nbytes("max_memory", self.max_memory)
        candidates = parse_candidates(self.candidates)
        check_profile(self.profile)
        texts = [(document, read_document(document)) for document in documents]
        for _, text in texts:
            check_request(text, "?", "never")
        return CheckedDocuments(self, texts, method, budget, max_memory, candidates)

    def _method(self) -> "Method | None":
        """The one that is named, with its settings; None: the default."""
        if self.method is not None:
            chosen = create_method(self.method, self.settings)
            if chosen.lookahead:
                problem = "looks ahead, but a document is cut before anything is asked: name another"
                raise ConfigError(problem, option="method", value=chosen.label)
            return chosen
        if self.settings:
            problem = "is an option of a method: name that by --method"
            raise ConfigError(problem, option="settings", value=self.settings[0])
        return None


@dataclass(frozen=True)
class CheckedDocuments:
    """Documents that a model can be loaded for."""

    reading: Reading
    texts: list[tuple[str, str]]
    """(document as it was typed, its text)."""
    method: "Method | None"
    budget: int | float | str
    max_memory: int | None
    candidates: int | None

    def sessions(self) -> "Iterator[Session]":
        """Load the model, and read one document after another."""
        from compresskv.models.load import load
        from compresskv.sessions.begin import find_method

        asked = self.reading
        with Bar() as bar:
            model, tokenizer = load(asked.model, dtype=asked.dtype, device=asked.device, on_progress=bar)
        method = find_method(model, self.method, asked.profile)
        for document, text in self.texts:
            yield self._read(model, tokenizer, method, name_of(document), text)

    def _read(self, model: Any, tokenizer: Any, method: "Method", name: str, text: str) -> "Session":
        """One document; a bar tells how much of it was read, and how long the rest will take."""
        from compresskv.sessions.begin import read

        asked = self.reading
        own: dict[str, Any] = {"store": asked.store, "chunk": asked.chunk, "max_memory": self.max_memory}
        own["candidates"] = self.candidates
        with Bar() as bar:
            own["on_read"] = lambda done, steps: bar(f"reading {name}", done / steps)
            return read(model, tokenizer, text, method=method, budget=self.budget, name=name, **own)
