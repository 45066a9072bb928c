"""The measured model and what it reads: a real model and real text, or random weights and random tokens."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.bench.geometry import random_model
from compresskv.calibration.haystack import read_haystack
from compresskv.models.dtype import multiplies
from compresskv.models.embedded import EMBEDDED
from compresskv.models.load import load, torch_device, torch_dtype
from compresskv.models.quantize import quantize_int8
from compresskv.models.shape import decoder_config

_SEED = 0


@dataclass
class Subject:
    """A model, and tokens that prompts are the beginnings of."""

    name: str
    model: PreTrainedModel
    read_tokens: Callable[[int], Tensor]
    """The first N tokens of its text, (1, N) on the model's device."""
    random: bool
    """Whether its weights are."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know, one line each."""

    def int8_model(self) -> PreTrainedModel:
        """A copy of the model with 8-bit weights.

        Raises:
            ConfigError: torchao is not installed.
        """
        copied = copy.deepcopy(self.model)
        quantize_int8(copied)
        return copied


def real_subject(
    name: str, *, dtype: str | None, device: str | None, on_progress: Callable[[str, float | None], None] | None = None
) -> Subject:
    """A model by name, which reads the calibration text.

    Raises:
        ConfigError, ModelError: as for `load`.
    """
    model, tokenizer = load(name, dtype=dtype, device=device, on_progress=on_progress)
    notes = [f"{name}'s weights were 4-bit and are de-quantised"] if name in EMBEDDED else []
    return Subject(
        name, model, lambda count: _text_tokens(tokenizer, count).to(model.device), random=False, notes=notes
    )


def random_subject(
    geometry: str,
    num_layers: int | None,
    max_tokens: int,
    *,
    dtype: str | None,
    device: str | None,
    whole: bool = False,
) -> Subject:
    """Random weights, which read random tokens. Without a dtype, bfloat16 where the device multiplies it, else float32.

    Args:
        num_layers, max_tokens, whole: as for `random_model`.
    Raises:
        ConfigError, ModelError: as for `random_model`.
    """
    place = torch_device(device)
    quick = torch.bfloat16 if multiplies(torch.bfloat16, place) else torch.float32
    built = random_model(geometry, num_layers, max_tokens, torch_dtype(dtype) or quick, place, whole=whole)
    notes = ["random weights and random tokens: for speed alone, methods choose without meaning"]
    return Subject(
        f"random {geometry}",
        built.model,
        lambda count: _random_tokens(built.model, count),
        random=True,
        notes=notes + ([built.note] if built.note else []),
    )


def _text_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """(1, count): the calibration text, from the beginning again where they end."""
    ids: list[int] = tokenizer(" ".join(read_haystack()), verbose=False)["input_ids"]
    return torch.tensor([list(itertools.islice(itertools.cycle(ids), count))])


def _random_tokens(model: PreTrainedModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(decoder_config(model).vocab_size, (1, count), generator=generator).to(model.device)
