"""An answer on a session's cache: what the question adds is read, and tokens are decoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.answer import Generation, GenerationStats
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.compiled.modes import NEVER
from compresskv.generation import Asked, speak
from compresskv.models.decoding import prefill
from compresskv.models.place import devices_of, input_device
from compresskv.sessions.facts import Facts
from compresskv.system.clock import now


class Answering:
    """Answers of one session, which together count how long its steps took that were not compiled."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._eager_s = 0.0

    def answer(
        self, facts: Facts, cache: CompressedCache, token_ids: list[int], asked: Asked, start: float
    ) -> Generation:
        """Read `token_ids` behind what the cache holds, and decode greedily.

        Args:
            facts: of the document.
            start: when the question came, on `system.clock`.
        """
        model, device = self._model, input_device(self._model)
        cache.num_compiled_steps, cache.compile_s = 0, 0.0  # of this answer alone, in a conversation too
        with routing(model), self._decoding(cache, asked) as prepare:
            logits = prefill(model, torch.tensor([token_ids], device=device), cache)
            cache.check_attended()
            prefill_s, first = now(*devices_of(model)) - start, int(logits.argmax())
            answered = speak(model, self._tokenizer, cache, first, asked, start=start, prepare=prepare)
        num_said = len(answered.token_ids) - 1  # read, of the answer
        prompt_tokens = cache.get_seq_length() - num_said
        behind = nbytes_behind(cache, prompt_tokens - facts.num_tokens)
        stats = GenerationStats(
            method=facts.method,
            budget=facts.budget,
            store=facts.store,
            prompt_tokens=prompt_tokens,
            truncated_tokens=0,
            retained_per_layer=[layer.num_retained - num_said for layer in cache.compressed_layers],
            kv_nbytes_full=facts.kv_nbytes_full + behind,
            kv_nbytes=facts.kv_nbytes + behind,
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


def nbytes_behind(cache: CompressedCache, num_tokens: int) -> int:
    """Bytes of so many tokens behind a document, which are held as the model gives them until they are packed."""
    states = [one for layer in cache.compressed_layers if layer.store is not None for one in layer.store.states]
    return num_tokens * sum(one.shape[1] * one.shape[3] * one.element_size() for one in states)
