"""The `compressing` context: any transformers model, three lines."""

import warnings
import weakref
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from compresskv import defaults
from compresskv.attention.pieces import AUTO, PrefillMemory, check_prefill_memory
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.cuts import CutOptions, find_cuts
from compresskv.cache.group import check_candidates
from compresskv.compiled import decoding, modes
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.compiled.modes import NEVER, check_mode
from compresskv.errors import CacheStateError, ConfigError, ModelError, ProfileError
from compresskv.methods.base import Method
from compresskv.methods.predicting import check_predicts
from compresskv.methods.prepare import prepare_method
from compresskv.models.dtype import warn_of_slow_dtype
from compresskv.models.load import check_model
from compresskv.plans.plan import Plan
from compresskv.profiles.profile import Profile
from compresskv.profiles.stores import warn_of_lossy_store
from compresskv.selection.budgets import Budget, read_budget
from compresskv.selection.cuts import CHUNK_TOKENS, DECODE_INTERVAL
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.system.check import check_callbacks, check_flag
from compresskv.system.progress import Progress


class Compressing(AbstractContextManager[CompressedCache]):
    """What `compressing` returns. Each entry makes a new cache; entries may nest and repeat, in several threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: Budget,
        *,
        compile: str = NEVER,
        on_progress: Progress | None = None,
        **cache_options: Any,
    ) -> None:
        check_mode(compile)
        check_predicts(method, budget)
        self._model = model
        self._compile = compile
        self._on_progress = on_progress
        self._method = method
        self._budget = budget
        self._cache_options = cache_options
        self._open: list[_Entry] = []

    def __enter__(self) -> CompressedCache:
        """Route the model's attention through ours and return an empty cache.

        Raises:
            ModelError: the model cannot be used.
        """
        with ExitStack() as stack:
            stack.enter_context(routing(self._model))
            cache = CompressedCache(self._model, self._method, self._budget, **self._cache_options)
            compiled = None
            if self._compile != NEVER:
                compiled = CompiledDecoding(self._model, cache, self._compile, self._on_progress)
                stack.enter_context(compiled)
            entry = _Entry(stack.pop_all(), cache, compiled)
        self._open.append(entry)
        _entered.set((*_entered.get(), weakref.ref(entry)))
        return cache

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the model its own attention back."""
        entry = self._last_entry()
        self._open.remove(entry)
        _entered.set(tuple(known for known in _entered.get() if known() not in (entry, None)))
        entry.stack.close()
        layer = entry.cache.compressed_layers[0]
        if kind is None and layer.in_prefill and 0 < layer.seen_tokens < layer.num_prompt_tokens:
            read = f"{layer.seen_tokens} tokens were read: nothing was evicted"
            warnings.warn(f"prompt_tokens={layer.num_prompt_tokens}, but {read}", stacklevel=2)

    def _last_entry(self) -> "_Entry":
        """The last one of this thread and asyncio task that is open; of any, where it was entered in another.

        Raises:
            CacheStateError: none is.
        """
        entered = [known() for known in _entered.get()]
        own = [entry for entry in entered if entry is not None and entry in self._open]
        if not self._open:
            raise CacheStateError("a compressing context is left that was not entered: use it in a `with`")
        return (own or self._open)[-1]

    def prepare_decoding(self) -> None:
        """After the prompt, build or load the compiled step now rather than at the next token (`compile='always'`)."""
        if self._open and (compiled := self._last_entry().compiled) is not None:
            compiled.prepare()


@dataclass(frozen=True, eq=False)
class _Entry:
    stack: ExitStack
    cache: CompressedCache
    compiled: CompiledDecoding | None


_entered: ContextVar[tuple[weakref.ref[_Entry], ...]] = ContextVar("_entered", default=())
"""What this thread, or asyncio task, has entered, of all `Compressing` objects. Copies of it, which tasks keep that
were begun inside, hold no cache."""


def compressing(
    model: PreTrainedModel,
    method: str | Method | Plan = defaults.METHOD,
    budget: Budget = defaults.BUDGET,
    *,
    profile: Profile | str | Path | None = None,
    prompt_tokens: int | None = None,
    chunk_budget: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    decode_budget: int | None = None,
    decode_interval: int = DECODE_INTERVAL,
    decode_method: str | Method | None = None,
    exact_prefill: bool | None = None,
    store: str = NATIVE,
    prefill_memory: PrefillMemory = AUTO,
    candidates: int | None = defaults.CANDIDATES,
    compile: str | None = None,
    on_compile: Progress | None = None,
    **options: Any,
) -> Compressing:
    """Compress the KV cache of what `model` reads inside the `with`.

        with compresskv.compressing(model, method="snapkv", budget=256) as cache:
            model.generate(**inputs, past_key_values=cache)

    The first forward pass on the cache is the prompt: it attends to all of itself, then each layer keeps what the
    method chose and frees the rest. Later passes (decoding, a second question) attend to what was kept.

    Args:
        model: a decoder-only transformers model with any attention implementation: where nothing of a prompt is padded
            it is read by that, all else by sdpa.
        method: a name (see `compresskv methods`), a name with options ('snapkv[window_size=32]'), a `Method`, or a
            `Plan` of this very prompt, which brings its budget.
        budget: tokens retained per KV head per layer, window included: a count (1 is one token), a share of the prompt
            as a float (1.0 is all), one count for each full-attention layer, or text for bytes in all of these layers
            together: '3MB', or '5% of bytes', a share of the full cache's. Other text is read as on the command line:
            '256', '15%'.
            'auto' keeps of each prompt as much as its predicted loss asks for: 'auto[max_loss=0.05,at_most=25%]' allows
            that loss, in nats per token, and no more tokens than that, whatever is lost (docs/auto.md).
            A budget of at least the prompt's length changes nothing; one at or below the method's window keeps the most
            recent tokens (`blend` and `vote` narrow theirs).
        profile: for methods that need one, a `Profile` or its file; None finds the model's own.
        prompt_tokens: the prompt's exact length, where it is read in several forward passes (`prefill_chunk_size`):
            eviction waits until that many tokens were read.
        chunk_budget: cut long prompts while they are read, too, so that no more than a part of one is ever held: at
            each multiple of `chunk_tokens` tokens, but where the prompt ends within an observation window, so many stay
            in every KV head (or what the fullest keeps in the end, where that is more; a count below `budget` is
            refused). They are chosen for what the prompt ends with: its last 64 tokens (as many as the window has,
            where these are more) are read beforehand at each cut, where the pass under way holds them. Attention to the
            prompt gets cheaper. None: prompts are cut at their end. Not for padded batches. The cache's `chunk_stats`
            tell what was done.
        chunk_tokens: see `chunk_budget`; at least the method's window.
        decode_budget: cut what is generated, too, so that the cache does not grow with the answer: after each
            `decode_interval` new tokens, KV heads that hold more keep so many, the prompt's among them. None: what is
            generated stays.
        decode_interval: see `decode_budget`; at least the window of `decode_method`.
        decode_method: chooses among what is held then. One that chooses the same tokens for all layers (`vote`) needs a
            `method` that keeps the same tokens in all of them, and `candidates` do not count then; one that shares a
            budget among layers (`blend`, `cake`, `defensivekv`) is refused. None: `rkv_ahead`, or `rkv` where
            the model's profile lacks what that needs.
        exact_prefill: True reads prompts by the model's own attention function alone. Else, in bfloat16 on a CPU that
            multiplies it, whole prompts of 256 to 16,384 tokens are read two to three times as fast by matrix products
            that round logits and weights to bfloat16 (docs/speed.md). None: as the variable COMPRESSKV_EXACT_PREFILL
            says, which holds for all commands and full caches, too; False where it is not set.
        store: in how many bits a number what is kept is held once the prompt was read: 'native', as the model computes
            it; 'int8'; 'int4k8', keys in 8 bits and values in 4; 'int4'; or 'int2' (docs/stores.md). Budgets count
            tokens in all of them. New tokens are packed a few at a time.
        prefill_memory: about what a layer's activations may need in bytes while the prompt is read. Each layer then
            takes it in pieces, so that no more is held than the prompt's hidden states, one layer's keys and values,
            and what is kept; attention is over the whole prompt as ever. 'auto' reads prompts of more than 4,096 tokens
            in pieces of at most that; None reads all at once.
        candidates: methods that decide when all layers were read hold, until then, of each layer no more than its
            likeliest tokens: so many times its budget, and at least 512, where the prompt has twice as many or more.
            What they keep is chosen among these (docs/speed.md tells what that loses), and the cache's
            `candidate_stats` tell how many they were. None holds the whole prompt
            until the end, for the exact choice; a plan (`make_plan`) is exact, too, and holds less, but reads twice.
        compile: 'always' decodes by a compiled step, which is built once for a model (about a minute) and kept on disk;
            'auto' uses one that is there, when decoding has lasted long enough to pay for loading it; 'never' does not.
            On a CUDA device a step is recorded in a moment, for several rows without padding, too, and nothing is
            kept. None: 'auto' on a CUDA device, else 'never'.
            Where it cannot be done, decoding goes on without, and the cache's `not_compiled` says why.
        on_compile: called with a message when a step is being built.
        options: the method's own options, such as window_size.
    Raises:
        ConfigError: an unknown method, option or mode, a value out of range, a method that replays the prompt, or one
            that must see or keeps all of it beside `chunk_budget`.
        ProfileError: no profile of this model, or one of another model.
        PlanError: a plan of another model.
        ModelError: a model that cannot be used; where no profile is needed, on entering.
    """
    check_model(model)
    check_callbacks(on_compile=on_compile)
    check_flag("exact_prefill", exact_prefill, or_none=True)
    if isinstance(method, Plan):
        if options:
            raise ConfigError(f"options {', '.join(options)} are given beside a plan, which takes none")
        method = method.as_method(model)
    cuts = CutOptions(chunk_budget, chunk_tokens, decode_budget, decode_interval, decode_method)
    held: dict[str, Any] = {"store": store, "prefill_memory": prefill_memory, "candidates": candidates}
    chosen, budget, cut = prepare(model, method, budget, profile, cuts, options, **held)
    if chosen.replays:
        raise ConfigError(
            f"method {chosen.name!r} reads the prompt twice and must know its tokens: give compressing a plan by "
            "compresskv.make_plan, or use compresskv.ask"
        )
    warn_of_slow_dtype(model)
    if compile is None:
        compile = modes.AUTO if decoding.records_steps(model) else modes.NEVER
    given: dict[str, Any] = {"prompt_tokens": prompt_tokens, "exact_prefill": exact_prefill, **held, **cut}
    return Compressing(model, chosen, budget, compile=compile, on_progress=on_compile, **given)


def prepare(
    model: PreTrainedModel,
    method: str | Method,
    budget: Budget,
    profile: Profile | str | Path | None,
    cuts: CutOptions,
    options: dict[str, Any],
    *,
    store: str,
    prefill_memory: PrefillMemory,
    candidates: int | None,
    reads_twice: bool = False,
) -> tuple[Method, Budget, dict[str, Any]]:
    """Check what `compressing` and `ask` are given alike, before anything is read.

    Args:
        options: the method's.
        reads_twice: as for `find_cuts`.
    Returns: the method, ready for the model; the budget; and options of a `CompressedCache` for the cuts.
    Raises:
        ConfigError, ProfileError: as for `compressing`.
    """
    check_prefill_memory(prefill_memory)
    check_candidates(candidates)
    find_precision(store)
    budget = read_budget(budget)
    chosen = prepare_method(model, method, profile, is_shared=cuts.needs_profile, **options)
    warn_of_lossy_store(getattr(chosen, "profile", None), store)
    chunks, decoding = find_cuts(chosen, budget, cuts, reads_twice=reads_twice)
    cut: dict[str, Any] = {"chunks": chunks}
    if decoding is not None:
        cut["decode"], decode_method = decoding
        cut["decode_method"] = _prepare_decoding(model, decode_method, cuts, chosen, profile)
    return chosen, budget, cut


def _prepare_decoding(
    model: PreTrainedModel,
    method: Method,
    cuts: CutOptions,
    of_prompt: Method,
    profile: Profile | str | Path | None,
) -> Method:
    """The method that cuts what is generated, ready for the model; where none is named, the better of the defaults."""
    if cuts.decode_method is None:
        known = getattr(of_prompt, "profile", None) if profile is None else profile
        try:
            return prepare_method(model, defaults.DECODE_METHODS[0], known)
        except (ProfileError, ModelError):  # a model that cannot be named has no profile
            return method
    return prepare_method(model, method, profile if method.needs_profile else None)
