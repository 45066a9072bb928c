"""An answer on a session's cache: what the question adds is read, and tokens are decoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.compiled.modes import NEVER, check_mode
from compresskv.generation import Generation, GenerationStats, speak
from compresskv.models.decoding import OnToken, prefill
from compresskv.models.place import devices_of, input_device
from compresskv.sessions.facts import Facts
from compresskv.system.check import check_callbacks
from compresskv.system.clock import now
from compresskv.system.progress import Progress


@dataclass(frozen=True)
class Asked:
    """When an answer was asked for, and how; see `compresskv.ask`."""

    start: float
    """On `system.clock`."""
    max_new_tokens: int
    compile: str
    on_text: Callable[[str], None] | None
    on_token: OnToken | None
    on_compile: Progress | None

    def __post_init__(self) -> None:
        """Refuse an unknown way to compile, and nobody to tell, before anything is read."""
        check_mode(self.compile)
        check_callbacks(on_text=self.on_text, on_token=self.on_token, on_compile=self.on_compile)


class Answering:
    """Answers of one session, which together count how long its steps took that were not compiled."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._eager_s = 0.0

    def answer(self, facts: Facts, cache: CompressedCache, token_ids: list[int], asked: Asked) -> Generation:
        """Read `token_ids` behind what the cache holds, and decode greedily.

        Args:
            facts: of the document.
        """
        model, device = self._model, input_device(self._model)
        cache.num_compiled_steps, cache.compile_s = 0, 0.0  # of this answer alone, in a conversation too
        with routing(model), self._decoding(cache, asked) as prepare:
            logits = prefill(model, torch.tensor([token_ids], device=device), cache)
            cache.check_attended()
            prefill_s = now(*devices_of(model)) - asked.start
            answered = speak(
                model,
                self._tokenizer,
                cache,
                int(logits.argmax()),
                asked.max_new_tokens,
                start=asked.start,
                prepare=prepare,
                on_text=asked.on_text,
                on_token=asked.on_token,
            )
        num_said = len(answered.token_ids) - 1  # read, of the answer
        stats = GenerationStats(
            method=facts.method,
            budget=facts.budget,
            store=facts.store,
            prompt_tokens=cache.get_seq_length() - num_said,
            truncated_tokens=0,
            retained_per_layer=[layer.num_retained - num_said for layer in cache.compressed_layers],
            kv_nbytes_full=facts.kv_nbytes_full,
            kv_nbytes=facts.kv_nbytes,
            prefill_s=prefill_s,
            **answered.cost(model, cache),
        )
        return Generation(answered.text, answered.token_ids, stats)

    @contextmanager
    def _decoding(self, cache: CompressedCache, asked: Asked) -> Iterator[Callable[[], None]]:
        """Steps are compiled where that is asked for; what to call before the first one.

        With 'auto' a step is loaded once decoding has taken as long, all answers together.
        """
        if asked.compile == NEVER:
            yield lambda: None
            return
        with CompiledDecoding(self._model, cache, asked.compile, asked.on_compile) as compiled:
            compiled.eager_s = self._eager_s
            yield compiled.prepare
            self._eager_s = compiled.eager_s
