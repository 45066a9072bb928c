"""What one model type does with a compressed cache: equals the masked reference, or is refused in one line."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import compresskv
import shrunk
import tiny
from compresskv import CacheStateError, CompressedCache, CompressKVError, ModelError
from compresskv.attention.support import check_supported
from compresskv.models.decoding import prefill
from oracle import evictions, masking

NUM_PROMPT = 80
STEPS = [NUM_PROMPT, 1, 5, 1]
NUM_CROPPED = 3
BUDGET = 24
METHODS = ("full", "snapkv", "adakv", "blend")
IN_PIECES = ("full", "adakv")
"""Of these, those whose prompts are read in pieces."""
NEWER = ": newer transformers may have none"
"""The end of a refusal that depends on the version."""
_TOLERANCE = 2e-3
"""Of the logits' standard deviation, beside what reading with a cache changes in the plain model."""


@dataclass(frozen=True)
class Outcome:
    """Of one type."""

    word: str
    """'works', 'refused' or 'untried'."""
    reason: str = ""


def examine(model_type: str) -> Outcome:
    """Try one type with each of `METHODS`.

    Raises:
        AssertionError: it does something else than it should.
    """
    try:
        model = shrunk.build(model_type)
    except Exception as error:  # noqa: BLE001 - a package that is missing, or a config that cannot be shrunk
        return Outcome("untried", f"cannot be built here: {_first_line(error)}")
    refusal = _refusal(model)
    sequence = tiny.random_tokens(sum(STEPS)).clamp(max=tiny.VOCAB_SIZE - shrunk.NUM_SPECIAL - 1)
    if refusal is None:
        try:
            plain = _read(model, _plain_cache(model), sequence)
        except Exception as error:  # noqa: BLE001 - it wants images, or transformers cannot run it either
            refusal = _refusal_to_read(model, sequence)
            if refusal is None:
                return Outcome("untried", f"reads no text alone: {_first_line(error)}")
    if refusal is None:
        try:
            for method in METHODS:
                check_method(model, method, sequence, plain)
        except ModelError as error:
            refusal = error
    if refusal is None:
        return Outcome("works")
    assert "\n" not in str(refusal)
    return Outcome("refused", str(refusal).replace(type(model).__name__, "the model"))


def _refusal(model: PreTrainedModel) -> ModelError | None:
    """Why it cannot be used, as told before anything is computed."""
    try:
        check_supported(model)
    except ModelError as error:
        check_entries(model, error)
        return error
    return None


def _refusal_to_read(model: PreTrainedModel, sequence: Tensor) -> ModelError | None:
    """Why verbs cannot read text with it, as they say themselves."""
    try:
        prefill(model, sequence, _plain_cache(model))
    except ModelError as error:
        return error
    except Exception:  # noqa: BLE001 - transformers' own
        return None
    return None


def check_entries(model: PreTrainedModel, expected: ModelError) -> None:
    """Check that every method says the same."""
    for method in METHODS:
        with pytest.raises(CompressKVError) as refused, compresskv.compressing(model, method, BUDGET):
            pass
        assert str(refused.value) == str(expected), method


def check_method(model: PreTrainedModel, method: str, sequence: Tensor, plain: Tensor) -> None:
    """Read a prompt, a token, a later turn, and another turn in place of its end; hold each logit to the reference.

    Raises:
        ModelError: the model's attention tells that it cannot be used; nothing is evicted then.
    """
    tolerance = _TOLERANCE + 5 * _difference(plain, _reference(model, sequence, {}))
    options: dict[str, Any] = {**tiny.options_for(model, method), "compile": "auto" if method == "snapkv" else "never"}
    options["prefill_memory"] = 1 if method in IN_PIECES else "auto"
    with compresskv.compressing(model, method, BUDGET, **options) as cache:
        try:
            logits = _read(model, cache, sequence)
        except ModelError:
            assert all(layer.positions is None for layer in cache.compressed_layers)
            raise
        evicted = evictions(cache)
        assert bool(evicted) == (method != "full")
        _assert_close(logits, _reference(model, sequence, evicted) if evicted else plain, method, tolerance)
        other = torch.cat([sequence[:, :-NUM_CROPPED], sequence[:, 5 : 5 + NUM_CROPPED]], dim=1)
        if _cropped(cache):
            logits = tiny.read(model, cache, other, [NUM_CROPPED])
            expected = _reference(model, other, evicted) if evicted else _read(model, _plain_cache(model), other)
            _assert_close(logits, expected[:, -NUM_CROPPED:], f"{method} after a crop", tolerance)
        cache.reset()
        again = tiny.read(model, cache, sequence, STEPS[:1])[:, -1:]
        _assert_close(again, plain[:, :1], f"{method} after a reset", tolerance)


def _cropped(cache: CompressedCache) -> bool:
    """Take back some tokens; where a layer cannot, nothing is changed."""
    lengths = [layer.seen_tokens for layer in cache.compressed_layers]
    nbytes = cache.nbytes
    try:
        cache.crop(-NUM_CROPPED)
    except CacheStateError:
        assert [layer.seen_tokens for layer in cache.compressed_layers] == lengths
        assert cache.nbytes == nbytes
        return False
    return True


def _plain_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _read(model: PreTrainedModel, cache: Cache, sequence: Tensor) -> Tensor:
    """The logits from the prompt's last token on."""
    return tiny.read(model, cache, sequence, STEPS)[:, NUM_PROMPT - 1 :]


@torch.no_grad()
def _reference(model: PreTrainedModel, sequence: Tensor, evicted: dict[int, Tensor]) -> Tensor:
    twin = copy.deepcopy(model)  # some types keep the positions of the last prompt on the model
    with masking(twin, evicted):
        output = twin(input_ids=sequence, attention_mask=torch.ones_like(sequence), use_cache=False)
    return output.logits[:, NUM_PROMPT - 1 :]


def _assert_close(logits: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    difference = _difference(logits, expected)
    assert difference < tolerance, f"{what}: logits differ by {difference:.1e} of their standard deviation"


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.std())


def _first_line(error: Exception) -> str:
    return next(line.strip() for line in f"{error or type(error).__name__}".splitlines() if line.strip())
