"""A document that was read once, and is asked often."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.answer import Generation
from compresskv.cache.cache import CompressedCache
from compresskv.cache.state import cache_state
from compresskv.compiled.modes import AUTO
from compresskv.errors import CacheStateError, ProfileError, PromptError, SessionError
from compresskv.generation import Asked
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import parse_method
from compresskv.models.decoding import OnToken, end_tokens
from compresskv.models.place import devices_of
from compresskv.profiles.profile import Profile
from compresskv.prompts.prompt import room_for_prompt
from compresskv.prompts.turns import Ending, next_part, question_tokens, turn_tokens
from compresskv.sessions.answering import Answering
from compresskv.sessions.conversation import TURNS_BUDGET, Conversation
from compresskv.sessions.document import Document, Lent
from compresskv.sessions.facts import Facts
from compresskv.sessions.file import Contents, Said, write_session
from compresskv.sessions.progress import OnRead
from compresskv.sessions.reading import check_length, held_by, read_on
from compresskv.sessions.turn import Turn
from compresskv.system.check import check_callbacks, check_count, check_path
from compresskv.system.clock import now
from compresskv.system.progress import Progress


class Session:
    """A document's compressed cache, and what goes on from it. Made by `read` and `open_session`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: CompressedCache,
        token_ids: list[int],
        ending: Ending,
        facts: Facts,
        method: Method | None = None,
    ) -> None:
        self._document = Document(cache, token_ids, ending, facts)
        self._model = model
        self.tokenizer = tokenizer
        self._method = method
        self._conversation: Conversation | None = None
        self._lent, self._saying = threading.Lock(), threading.Lock()
        self._answering = Answering(model, tokenizer)
        self.turns_budget = TURNS_BUDGET
        """Tokens of turns that a conversation keeps: where it has more, the oldest turns are forgotten until half of
        that is left."""

    @property
    def facts(self) -> Facts:
        """Where it comes from and what it keeps."""
        return self._document.facts

    @property
    def token_ids(self) -> list[int]:
        """Of the chat head and the document, as they were read."""
        return self._document.token_ids

    @property
    def cache(self) -> CompressedCache:
        """The document's, to look at: questions go on from it."""
        return self._document.cache

    @property
    def nbytes(self) -> int:
        """Bytes that the document's keys and values hold now, with the room that questions are written to."""
        return self.cache.nbytes

    @property
    def num_said(self) -> int:
        """Tokens of the conversation that are held beside the document."""
        return 0 if self._conversation is None else self._conversation.num_kept

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Those of the conversation that are held beside the document."""
        return () if self._conversation is None else tuple(self._conversation.turns)

    def tokens_of(self, question: str) -> list[int]:
        """What a question adds to the document, up to where its answer begins.

        Raises:
            PromptError: it is empty or no text, or the chat template loses it.
        """
        return question_tokens(self.tokenizer, self._document.ending, question)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        compile: str = AUTO,
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
        on_compile: Progress | None = None,
    ) -> Generation:
        """Answer a question about the document greedily. Questions do not see one another.

        The document's keys and values are neither copied nor changed: question and answer are written behind them.

        Args:
            max_new_tokens, compile, on_text, on_token, on_compile: as for `compresskv.ask`.
        Raises:
            ConfigError: a value out of range.
            PromptError: an empty question, or one that does not fit into the model's context.
        """
        asked, start = Asked(max_new_tokens, compile, on_text, on_token, on_compile), now(*devices_of(self._model))
        with self._lending() as document:
            token_ids = question_tokens(self.tokenizer, document.ending, question)
            self._check_fits(len(document.token_ids) + len(token_ids), max_new_tokens)
            cache = document.branch(len(token_ids) + max_new_tokens)
            return self._answering.answer(document.facts, cache, token_ids, asked, start)

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 128,
        compile: str = AUTO,
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
        on_compile: Progress | None = None,
    ) -> Generation:
        """Go on in the conversation: what was said before is seen, as far as `turns_budget` goes.

        An answer that was interrupted ends the conversation: the next turn begins a new one.

        Args:
            max_new_tokens, compile, on_text, on_token, on_compile: as for `compresskv.ask`.
        Raises:
            ConfigError, PromptError: as for `ask`; or the model's chat template takes no conversation.
            CacheStateError: another thread's turn is being answered.
        """
        asked = Asked(max_new_tokens, compile, on_text, on_token, on_compile)
        if not self._saying.acquire(blocking=False):
            raise CacheStateError("another turn of the conversation is being answered: wait for it")
        try:
            return self._say(text, asked, now(*devices_of(self._model)))
        finally:
            self._saying.release()

    def _say(self, text: str, asked: Asked, start: float) -> Generation:
        talk, max_new_tokens = self._conversation, asked.max_new_tokens
        if talk is None:
            talk, token_ids = self._begun(text, max_new_tokens)
        else:
            ends = end_tokens(self._model, self.tokenizer)
            token_ids = turn_tokens(self.tokenizer, talk.answer, ends, text)
            self._check_fits(talk.cache.get_seq_length() + len(token_ids), max_new_tokens)
        before = talk.cache.get_seq_length()
        try:
            found = self._answering.answer(talk.facts, talk.cache, token_ids, asked, start)
        except BaseException:  # half a turn was read
            talk.lease.close()
            self._conversation = None
            raise
        talk.note(before, text, found)
        talk.forget_oldest(self.turns_budget)
        self._conversation = talk
        if talk.facts is not self.facts:  # the document grew meanwhile
            self.forget()
        return found

    def _begun(self, text: str, max_new_tokens: int) -> tuple[Conversation, list[int]]:
        """A conversation in which nothing was said yet, and the tokens of its first turn."""
        with ExitStack() as lease:
            document = lease.enter_context(self._lending())
            token_ids = question_tokens(self.tokenizer, document.ending, text)
            self._check_fits(len(document.token_ids) + len(token_ids), max_new_tokens)
            cache = document.branch(len(token_ids) + max_new_tokens + self.turns_budget)
            return Conversation(cache, document.facts, lease=lease.pop_all()), token_ids

    def forget(self) -> None:
        """End the conversation: the next turn begins a new one."""
        if self._conversation is not None:
            self._conversation.lease.close()
            self._conversation = None

    def append(
        self,
        text: str,
        *,
        profile: Profile | str | Path | None = None,
        chunk: int | None = None,
        on_read: OnRead | None = None,
    ) -> None:
        """Let the document grow: `text` is read against what is kept, and cut so that the whole is within the budget.

        Every part has the share of the budget that it has of the tokens: of a count of tokens, earlier parts then keep
        less. What was kept of them is not chosen anew. A conversation that another thread began meanwhile is ended.

        Args:
            profile: as for `read`, where this was opened from a file and the method needs one.
            chunk, on_read: as for `read`.
        Raises:
            CacheStateError: a conversation, or another thread's question, goes on.
            PromptError: an empty text, or one that does not fit into the model's context.
            ConfigError, ProfileError: the method, or its profile, is not to be found here.
        """
        check_callbacks(on_read=on_read)
        check_count("chunk", chunk, or_none=True)
        if self._conversation is not None or not self._lent.acquire(blocking=False):
            raise CacheStateError(
                "the document cannot grow while a conversation or a question goes on: forget() it first"
            )
        try:
            self._grow(self._document, text, self._found_method(profile), chunk, on_read)
        finally:
            self._lent.release()

    def _grow(self, document: Document, text: str, method: Method, chunk: int | None, on_read: OnRead | None) -> None:
        part = next_part(self.tokenizer, document.ending, text)
        token_ids = [*document.token_ids, *part.input_ids]
        check_length(self._model, len(token_ids))
        start = now(*devices_of(self._model))
        cache = document.cache.branch()  # what was read stays as it is where this is interrupted
        budget = 1.0 if document.facts.budget is None else document.facts.budget  # None: all is kept
        read_on(self._model, cache, part.input_ids, method, budget, chunk=chunk, on_read=on_read)
        read_s = document.facts.read_s + now(*devices_of(self._model)) - start
        facts = replace(document.facts, **held_by(cache, token_ids), read_s=read_s)
        self._document, self._method = Document(cache, token_ids, part.ending, facts), method
        self.forget()  # what another thread began to say meanwhile was of the document as it was

    def _found_method(self, profile: Profile | str | Path | None) -> Method:
        """What the document was read with.

        Raises:
            ConfigError, ProfileError: it is not to be found here, or its profile is another.
        """
        if self._method is not None:
            return self._method
        method = parse_method("method", self.facts.method)
        method = prepare_method(self._model, method, profile)
        own = getattr(method, "profile", None)
        if own is not None and own.digest != self.facts.profile:
            raise ProfileError(
                f"the document was read with another profile of this model, {self.facts.profile}: this is {own.digest}"
            )
        return method

    @contextmanager
    def _lending(self) -> Iterator[Lent]:
        """The document, to be asked: it does not grow meanwhile, unless it was growing already."""
        alone = self._lent.acquire(blocking=False)
        try:
            yield Lent(**vars(self._document), alone=alone)
        finally:
            if alone:
                self._lent.release()

    def _check_fits(self, num_tokens: int, max_new_tokens: int) -> None:
        """Refuse what would go beyond the model's positions.

        Raises:
            ConfigError: max_new_tokens cannot be used.
            PromptError: there is no room.
        """
        room = room_for_prompt(self._model, max_new_tokens)
        if room is not None and num_tokens > room:
            raise PromptError(
                f"document and question have {num_tokens} tokens, with what was said before, but the model's context "
                f"leaves room for {room} before the answer"
            )

    def save(self, path: str | Path) -> None:
        """Write what is kept, and the conversation, to a file that `open_session` reads. It holds the text, as tokens.

        Raises:
            SessionError: the place cannot be written, or a layer holds what cannot be saved; nothing is written.
        """
        check_path("path", path)
        talk, document = self._conversation, self._document
        try:
            with document.laid_out:
                state = cache_state(document.cache)
            said = None if talk is None else Said(cache_state(talk.cache), tuple(talk.turns), talk.answer)
        except CacheStateError as error:
            raise SessionError(f"this session cannot be saved: {error}") from error
        write_session(path, Contents(document.facts, document.token_ids, document.ending, state, said))

    def resume(self, cache: CompressedCache, turns: Sequence[Turn], answer: list[int]) -> None:
        """Go on with a conversation that was saved; see `Conversation`."""
        last = [turn.ending_at(cache.get_seq_length()) for turn in turns[-1:]]
        self._conversation = Conversation(cache, self.facts, [*turns[:-1], *last], answer)
