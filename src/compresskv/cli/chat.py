"""`compresskv chat`: a conversation about a document, in the terminal."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv.cli.kept import SUFFIX, load_session, names_session
from compresskv.cli.meanwhile import told_end, told_notes
from compresskv.cli.options import CompileOption
from compresskv.cli.outputs import check_outputs
from compresskv.cli.places import check_place, choose_places, free_place
from compresskv.cli.reading import Reading
from compresskv.cli.spread import spread
from compresskv.cli.terminal import Bar, Building, Stream, beginning, counted, err, megabytes
from compresskv.compiled.modes import check_mode
from compresskv.errors import CompressKVError, ConfigError, PromptError, SessionError, told
from compresskv.sessions.header import is_session
from compresskv.system.check import check_least
from compresskv.system.interrupts import hear_again
from compresskv.system.paths import exists

if TYPE_CHECKING:
    from compresskv.answer import Generation
    from compresskv.sessions.session import Session

EPILOG = """\b
Examples:
  compresskv chat report.txt
  compresskv chat report.kvc --max-new-tokens 300
  printf 'Who signed it?\\nWhen?\\n' | compresskv chat report.kvc
"""

_HELP = """\
/save [FILE]  write the document and this conversation to a file, which `compresskv session show` shows
/forget       begin a new conversation about the same document
/stats        what is kept, and what the last answer cost
/help         this list
/quit         end; so does Ctrl-D
Ctrl-C ends an answer. What begins with // is said with one stroke."""


@spread(Reading)
def chat(
    document: Annotated[str, typer.Argument(help="A text file, or a file of 'compresskv read'.")],
    *,
    given: Reading,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", metavar="TOKENS")] = 256,
    compile: CompileOption = "auto",
) -> None:
    """Talk about a document: what was said before is seen, and the document is read only once.

    Lines come from the terminal, or from standard input where that is none. /help lists commands.
    """
    check_mode(compile)
    check_least("max_new_tokens", max_new_tokens)
    if document == "-":
        problem = "is standard input, from which your questions come: name a file"
        raise ConfigError(problem, option="document", value=document)
    inputs: dict[str, str | Path | None] = {"profile": given.profile, "model": given.model}
    opened = Path(document) if names_session(document) else None
    if opened is not None:
        given.check_session()
        session = load_session(document, given.model, given.dtype, given.device)
    else:
        inputs["document"] = document
        (session,) = given.checked([document]).sessions()
    _Chat(session, _Saving(Path(document).stem, opened, inputs), max_new_tokens, compile).run(_lines())


class _Chat:
    """What is done with each line."""

    def __init__(self, session: "Session", saving: "_Saving", max_new_tokens: int, compile: str) -> None:
        self._session = session
        self._saving = saving
        self._max_new_tokens = max_new_tokens
        self._compile = compile
        self._last: Generation | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/forget": self._forget,
            "/stats": self._stats,
            "/help": lambda _: err.print(_HELP),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Until the lines end, or one says so."""
        facts = self._session.facts
        err.print(
            f"[{', '.join(facts.names) or 'document'}: {facts.num_tokens:,} tokens, "
            f"{facts.mean_retained / facts.num_tokens:.0%} kept{self._said()}; /help lists commands]"
        )
        for note in told_notes(facts.notes):
            err.print(note)
        for line in lines:
            name, _, rest = line.strip().partition(" ")
            if name in ("/quit", "/exit"):
                return
            if not name:
                continue
            try:
                _check_text(line)
                if name.startswith("/") and not name.startswith("//"):
                    self._command(name, rest.strip())
                else:
                    self._say(line.strip().removeprefix("/") if name.startswith("//") else line)
            except CompressKVError as error:
                err.print(f"compresskv: {' '.join(str(error).split())}")

    def _said(self) -> str:
        """What an opened conversation goes on from."""
        turns = self._session.turns
        if not turns:
            return ""
        last = "" if turns[-1].question is None else f", the last: {beginning(turns[-1].question)!r}"
        return f"; goes on behind {counted(len(turns), 'turn')}{last}"

    def _command(self, name: str, rest: str) -> None:
        if name not in self._commands:
            err.print(f"compresskv: {name} is no command: /help lists them")
            return
        self._commands[name](rest)

    def _say(self, text: str) -> None:
        with Bar() as bar, _interruptible() as is_stopped, Stream(bar) as stream:
            bar("reading", None)
            self._last = self._session.say(
                text,
                max_new_tokens=self._max_new_tokens,
                compile=self._compile,
                on_text=stream,
                on_token=lambda _: is_stopped(),
                on_compile=Building(bar),
            )
        if self._last.stats.generated_tokens == self._max_new_tokens and self._last.stats.cut_off:
            err.print(told_end(self._max_new_tokens))

    def _save(self, given: str) -> None:
        place = self._saving.find_place(given)
        self._session.save(place)
        self._saving.note(place)
        err.print(f"[saved: {place}, {megabytes(place.stat().st_size)} MB]")

    def _forget(self, _: str) -> None:
        self._session.forget()
        err.print("[a new conversation]")

    def _stats(self, _: str) -> None:
        facts, last = self._session.facts, self._last
        err.print(
            f"[{facts.method}: {facts.mean_retained:,.0f} of {facts.num_tokens:,} tokens kept per layer; KV cache "
            f"{megabytes(facts.kv_nbytes_full)} -> {megabytes(facts.kv_nbytes)} MB; {self._session.num_said:,} tokens "
            f"of the conversation beside it]"
        )
        if last is not None:
            speed = last.stats.decode_tokens_per_s
            then = "" if speed is None else f", then {speed:.0f} tokens/s"
            err.print(f"[last answer: first token after {last.stats.time_to_first_token_s:.1f} s{then}]")


class _Saving:
    """Which files a conversation is saved to: those of its own, and new ones."""

    def __init__(self, stem: str, opened: Path | None, inputs: dict[str, str | Path | None]) -> None:
        """Begin.

        Args:
            stem: of the document's name, for a file that nothing else was named for.
            opened: the session that the conversation goes on with, if any.
            inputs: what was read; see `check_outputs`.
        """
        self._stem = stem
        self._own: list[Path] = []
        self._inputs = inputs
        if opened is not None:
            self.note(opened)

    def note(self, place: Path) -> None:
        """A file that may be replaced from now on: what it holds is of this conversation."""
        self._own.append(place)

    def find_place(self, given: str) -> Path:
        """The file that is named, or else the first of its own, or else a new one.

        Raises:
            SessionError: it cannot be written, or something else would be lost.
        """
        try:
            place = self._named(given) if given else self._own[0] if self._own else free_place(self._stem)
            check_outputs({"save": place}, self._inputs)
            check_place("save", place)
            if is_session(place) and not any(exists(own) and own.samefile(place) for own in self._own):
                raise ConfigError("is another session: name another file", option="save", value=place)
        except ConfigError as error:
            raise SessionError(told(repr(str(error.value)), error.problem)) from error
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise SessionError(f"{given!r} cannot be written: {reason}") from error
        return place

    def _named(self, given: str) -> Path:
        """The file that is named, or one in the folder that is."""
        slash = "/" if given.endswith(("/", os.sep)) else ""
        (place,) = choose_places([f"{self._stem}{SUFFIX}"], f"{Path(given).expanduser()}{slash}")
        return place


def _check_text(line: str) -> None:
    """Refuse what was no text in the terminal's encoding; Python stands surrogates for its bytes."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise PromptError("that line is not UTF-8 text: say it again") from None


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once: what is asked then says True. Twice: it interrupts, as elsewhere."""
    pressed: list[int] = []

    def note(*_: Any) -> None:
        if pressed:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)
        pressed.append(1)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # else the process ends, and hears no more of them
            signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What is typed, with history and editing where that can be had; or the lines of standard input."""
    if sys.stdin is None:
        raise ConfigError("standard input is closed: nothing can be said")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that one bad line ends nothing; see _check_text
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    read_line = _editor()
    while True:
        try:
            yield read_line()
        except KeyboardInterrupt:
            hear_again()  # as shells do: the line is dropped
        except EOFError:
            return


def _editor() -> Callable[[], str]:
    """Reads one line: by prompt_toolkit, or by what Python has."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits by it
        return lambda: input("> ")
    editor: Any = PromptSession()
    return lambda: str(editor.prompt("> "))
