"""What can be said of a session without its model: what the file tells about itself."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from compresskv.selection.budget_words import note_of
from compresskv.system.convert import Amount, Count


@dataclass(frozen=True)
class Facts:
    """Where a session comes from and what it keeps. Plain values, for JSON."""

    model: str
    """As it was loaded."""
    fingerprint: str
    """Architecture, shape and weights."""
    names: tuple[str, ...]
    """Of the documents, as far as they have any."""
    method: str
    """Name and the options that differ from its defaults."""
    budget: int | float | str | Annotated[list[int], Meta(min_length=1)] | None
    """As it was asked for; None where the method evicts nothing (older files: what was asked for all the same)."""
    profile: str | None
    """Digest of the method's profile."""
    num_tokens: Annotated[int, Meta(ge=1, le=2**48)]
    """Of the chat head and the document."""
    sha256: str
    """Stands for their token ids; see `prompt_digest`."""
    mean_retained: Amount
    """Tokens kept, mean over layers and KV heads."""
    kv_nbytes: Count
    """Bytes of what is kept."""
    kv_nbytes_full: Count
    """Bytes that the full cache would have."""
    read_s: Amount
    """Seconds that reading took."""
    created: str
    """When, in UTC (ISO 8601)."""
    dtype: str
    """Of the model's weights; in brackets behind it, who else quantised them."""
    store: str
    """In how many bits a number it is kept; see `compressing`."""
    versions: dict[str, str]

    @property
    def loaded_dtype(self) -> str:
        """What a model is loaded in to have this `dtype`: its checkpoint says who quantised the weights."""
        return self.dtype.partition(" (")[0]

    @property
    def notes(self) -> list[str]:
        """Where the budget may not be what was meant: of the document's end nothing is said, questions come later."""
        note = note_of(self.budget, self.mean_retained, self.num_tokens, window_size=0)
        return [] if note is None else [note]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
