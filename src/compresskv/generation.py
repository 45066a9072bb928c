"""Ask a document one question: prefill, evict, decode greedily, and say what it cost."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.answer import Generation, GenerationStats
from compresskv.attention import pieces
from compresskv.cache.cache import CompressedCache
from compresskv.cache.cuts import CutOptions
from compresskv.compiled.modes import AUTO, check_mode
from compresskv.compression import Compressing, prepare
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.models.decoding import OnToken, decode, end_tokens
from compresskv.models.dtype import warn_of_slow_dtype
from compresskv.models.load import check_model
from compresskv.models.place import devices_of, input_device
from compresskv.models.quantize import weights_dtype
from compresskv.plans.capture import read_prompt
from compresskv.plans.make import make_plan
from compresskv.plans.plan import Planned
from compresskv.profiles.profile import Profile
from compresskv.prompts.prompt import build_prompt, room_for_prompt
from compresskv.prompts.request import check_request
from compresskv.prompts.spoken import Spoken
from compresskv.selection.budget_words import note_of
from compresskv.selection.budgets import Budget
from compresskv.selection.cuts import CHUNK_TOKENS, DECODE_INTERVAL
from compresskv.selection.precision import NATIVE
from compresskv.system import memory
from compresskv.system.check import check_callbacks, check_flag
from compresskv.system.clock import now
from compresskv.system.progress import Progress


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    *,
    method: str | Method = defaults.METHOD,
    budget: Budget = defaults.BUDGET,
    profile: Profile | str | Path | None = None,
    store: str = NATIVE,
    max_new_tokens: int = 128,
    truncate: str = "never",
    two_pass: bool = False,
    chunk_budget: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    decode_budget: int | None = None,
    decode_interval: int = DECODE_INTERVAL,
    decode_method: str | Method | None = None,
    prefill_memory: pieces.PrefillMemory = pieces.AUTO,
    candidates: int | None = defaults.CANDIDATES,
    compile: str = AUTO,
    on_text: Callable[[str], None] | None = None,
    on_token: OnToken | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_compile: Progress | None = None,
    **options: Any,
) -> Generation:
    """Answer `question` about `context` greedily, with a compressed KV cache.

    Args:
        method, budget, profile, store, options: as for `compressing`.
        max_new_tokens: the longest answer.
        truncate: 'never' refuses a prompt above the model's context, 'middle' cuts the document's middle.
        two_pass: read the prompt twice, first to plan and then to keep: no more than one whole layer is ever held, also
            by methods that decide for all layers together.
        chunk_budget, chunk_tokens, decode_budget, decode_interval, decode_method, prefill_memory, candidates: as for
            `compressing`.
        compile: 'never', 'auto' or 'always', as for `compressing`.
        on_text: called with pieces of the answer as they come, in whole words.
        on_token: called with each token of the answer as it comes; True from it ends the answer.
        on_prefill: called with (layers done, layers) while the prompt is read; reading it again counts as more layers.
        on_compile: called with a message when a step is being compiled.
    Raises:
        ConfigError, ProfileError, ModelError: as for `compressing`.
        PromptError: an empty document or question, or a prompt that does not fit.
    """
    check_model(model, tokenizer)
    check_callbacks(on_prefill=on_prefill)
    asked = Asked(max_new_tokens, compile, on_text, on_token, on_compile)
    check_flag("two_pass", two_pass)
    check_request(context, question, truncate)
    cuts = CutOptions(chunk_budget, chunk_tokens, decode_budget, decode_interval, decode_method)
    held: dict[str, Any] = {"store": store, "prefill_memory": prefill_memory}
    more: dict[str, Any] = {"candidates": candidates, **held}
    chosen, budget, cut = prepare(model, method, budget, profile, cuts, options, reads_twice=two_pass, **more)
    warn_of_slow_dtype(model)
    if two_pass and chosen.lookahead:
        raise ConfigError(f"two passes cannot look ahead: leave out lookahead={chosen.lookahead}")
    room = room_for_prompt(model, max_new_tokens)
    prompt = build_prompt(tokenizer, context, question, max_tokens=room, truncate=truncate)
    token_ids = prompt.input_ids[0].tolist()
    devices = devices_of(model)
    start = now(*devices)
    plan, on_layer = None, on_prefill
    if two_pass:
        plan = make_plan(model, token_ids, chosen, budget, on_layer=_half(on_prefill, 0), **held)
        on_layer = _half(on_prefill, 1)
    evicting = chosen if plan is None else Planned(plan=plan)
    told: dict[str, Any] = {"compile": compile, "on_progress": on_compile, "on_layer": on_layer, **more, **cut}
    compressed = Compressing(model, evicting, budget, **told)
    with compressed as cache:
        logits = read_prompt(model, token_ids, cache)
        cache.check_attended()  # where one layer alone is compressed, only its next token would tell
        prefill_s = now(*devices) - start
        first = int(logits.argmax())
        answered = speak(model, tokenizer, cache, first, asked, start=start, prepare=compressed.prepare_decoding)
    stats = GenerationStats(
        method=chosen.label,
        store=store,
        prompt_tokens=len(token_ids),
        truncated_tokens=prompt.num_truncated,
        prefill_s=prefill_s,
        auto=next(iter(cache.auto_choices), None) if plan is None else plan.auto,
        **_kept(cache, chosen, budget, len(token_ids)),
        **answered.cost(model, cache),
    )
    return Generation(answered.text, answered.token_ids, stats, plan)


def _kept(cache: CompressedCache, method: Method, budget: Budget, num_prompt: int) -> dict[str, Any]:
    """The part of `GenerationStats` that tells what was kept, and how that was come by."""
    retained, told = [float(layer.mean_retained) for layer in cache.compressed_layers], method.told_budget(budget)
    mean = sum(retained) / len(retained)
    return {
        "budget": told,
        "retained_per_layer": retained,
        "kv_nbytes_full": cache.full_nbytes,
        "kv_nbytes": cache.retained_nbytes,
        "chunks": cache.chunk_stats,
        "decode": cache.decode_stats,
        "candidates": cache.candidate_stats,
        "budget_note": note_of(told, mean, num_prompt, method.window_at(int(mean))),
    }


@dataclass(frozen=True)
class Asked:
    """How an answer is asked for; see `ask`."""

    max_new_tokens: int
    compile: str
    on_text: Callable[[str], None] | None
    on_token: OnToken | None
    on_compile: Progress | None

    def __post_init__(self) -> None:
        """Refuse an unknown way to compile, and nobody to tell, before anything is read."""
        check_mode(self.compile)
        check_callbacks(on_text=self.on_text, on_token=self.on_token, on_compile=self.on_compile)


@dataclass(frozen=True)
class Answered:
    """What was said on a cache that held a prompt."""

    text: str
    token_ids: list[int]
    first_s: float
    """Seconds until the first token."""
    decode_s: float
    """Seconds after it."""
    cut_off: bool

    def cost(self, model: PreTrainedModel, cache: CompressedCache) -> dict[str, Any]:
        """The part of `GenerationStats` that every answer has."""
        return {
            "generated_tokens": len(self.token_ids),
            "cut_off": self.cut_off,
            "time_to_first_token_s": self.first_s,
            "decode_s": self.decode_s - cache.compile_s,
            "compiled_tokens": cache.num_compiled_steps,
            "compile_s": cache.compile_s,
            "not_compiled": cache.not_compiled,
            "peak_memory_nbytes": memory.peak_nbytes(input_device(model)),
            "dtype": weights_dtype(model),
        }


def speak(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: CompressedCache,
    first: int,
    asked: Asked,
    *,
    start: float,
    prepare: Callable[[], None],
) -> Answered:
    """Decode an answer greedily from its `first` token.

    Args:
        start: when the question came, on `system.clock`.
        prepare: called before tokens are decoded one by one.
    """
    devices = devices_of(model)
    first_s = now(*devices) - start
    spoken = None if asked.on_text is None else Spoken(tokenizer, asked.on_text)

    def tell(token: int) -> object:
        if spoken is not None:
            spoken.put(token)
        return None if asked.on_token is None else asked.on_token(token)

    if asked.max_new_tokens > 1:
        prepare()
    token_ids = decode(model, tokenizer, first, cache, asked.max_new_tokens, tell)
    if spoken is not None:
        spoken.end()
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
    cut_off = token_ids[-1] not in end_tokens(model, tokenizer)
    return Answered(text, token_ids, first_s, now(*devices) - start - first_s, cut_off)


def _half(on_prefill: Callable[[int, int], None] | None, half: int) -> Callable[[int, int], None] | None:
    """Progress of one of two passes, as part of the whole."""
    if on_prefill is None:
        return None
    return lambda done, layers: on_prefill(half * layers + done, 2 * layers)
