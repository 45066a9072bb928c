"""Tiny random models of every family that the tests run, with seeded weights, prompts and profiles."""

import functools
import math
import os
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compresskv import CompressedCache
from compresskv.bench.geometry import random_centres, random_weights
from compresskv.cache.layer import CompressedLayer
from compresskv.methods import registry
from compresskv.models.arguments import CACHE
from compresskv.models.fingerprint import fingerprint
from compresskv.models.shape import compressible_layers
from compresskv.profiles.layer_errors import l1_normalised
from compresskv.profiles.profile import Profile
from compresskv.selection.precision import PRECISIONS
from compresskv.selection.select import EMPTY_SLOT

DEVICE_VARIABLE = "COMPRESSKV_TEST_DEVICE"
DEVICE = torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))
"""Where the tests of contracts run."""
VOCAB_SIZE = 128
PAD = 0

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "num_hidden_layers": len(_MIXED_LAYERS),
    "layer_types": _MIXED_LAYERS,
    "tie_word_embeddings": False,
}
_GPT_OSS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
_GPT2 = {"tie_word_embeddings": False, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512}

# family -> (transformers' model type, what differs from _SHAPE)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3_text", _GEMMA),
    "llama_mha": ("llama", {"num_key_value_heads": 6}),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("gpt_oss", _GPT_OSS),
    "gpt2": ("gpt2", _GPT2),
    "mistral_sliding": ("mistral", {"sliding_window": 16}),
    **{f"llama_{size}": ("llama", {"head_dim": size, "num_hidden_layers": 2}) for size in (80, 96, 112)},
    "mamba": ("mamba", {"state_size": 4}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 6}),
}

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"]
ATTENTIONS = ["eager", "sdpa"]
REPLAYING_METHODS = [name for name, method in registry.methods().items() if method.replays]
METHODS = [name for name in registry.methods() if name not in (*REPLAYING_METHODS, "rkv_shared", "rkv_ahead")]
"""But those that score as `rkv`, and choose as `vote` or count `triattention`, too: they have tests of their own."""
STORES = list(PRECISIONS)
PACKED_STORES = [name for name, precision in PRECISIONS.items() if precision.is_packed]
EVICTING_METHODS = [name for name in METHODS if name != "full"]


_shared: dict[tuple[str, str, torch.dtype], PreTrainedModel] = {}


def shared_models() -> list[tuple[PreTrainedModel, str]]:
    """Every model that was built in this process, with the attention implementation it was built with."""
    return [(model, attn_implementation) for (_, attn_implementation, _), model in _shared.items()]


def tiny_model(family: str, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A shared instance: tests must leave it as they found it (the conftest checks that)."""
    key = (family, attn_implementation, dtype)
    if key not in _shared:
        _shared[key] = build_model(family, attn_implementation).to(dtype)
    return _shared[key]


def build_model(family: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A new instance, float32: the same weights at every call."""
    model_type, changes = _FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    sharpen(model, seed=sum(map(ord, family)))
    return model.eval().to(DEVICE)


@torch.no_grad()
def sharpen(model: PreTrainedModel, seed: int) -> None:
    """Seeded weights under which attention is peaked, so that evicting a token changes what comes out."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim >= 2:
            std = 1.5 / math.sqrt(weight.shape[-1])
            weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)
        elif name.endswith("router.bias"):  # drawn anew at every call
            weight.zero_()
        elif "sinks" in name:
            weight.copy_(torch.linspace(-1.0, 4.0, len(weight)))
        elif "q_norm" in name:
            weight.add_(1.0)
        elif "k_norm" in name:  # equal weights would make all keys' norms equal but for rounding
            weight.add_(torch.linspace(0.5, 1.5, len(weight)))


def random_profile(model: PreTrainedModel) -> Profile:
    """Valid, and with very unequal layer errors."""
    own, layers = fingerprint(model), compressible_layers(model)
    generator = torch.Generator().manual_seed(len(layers))
    scores = torch.rand(len(layers), own.num_query_heads, generator=generator, device="cpu").tolist()
    errors = l1_normalised([2.0**layer for layer in range(len(layers))])
    return Profile(
        model_id="tiny",
        fingerprint=own,
        layer_indices=tuple(layers),
        semantic_scores=tuple(map(tuple, scores)),
        traditional_scores=None,
        num_runs=1,
        layer_errors_by_set={"random": errors},
        layer_errors=errors,
        replay_weights=tuple(random_weights(model, layer) for layer in layers),
        query_centres=tuple(random_centres(model, layer) for layer in layers),
    )


def options_for(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """What `compressing` needs beside the method's name."""
    return {"profile": random_profile(model)} if registry.methods()[method].needs_profile else {}


def kept_tokens(layer: CompressedLayer) -> list[list[list[int]]]:
    """For each row and KV head, the prompt tokens that the layer says it keeps, in its order."""
    assert layer.keys is not None
    num_rows, num_heads = layer.keys.shape[:2]
    if layer.positions is None:
        return [[list(range(layer.num_prompt_tokens))] * num_heads] * num_rows
    rows = layer.positions.expand(num_rows, num_heads, -1).tolist()
    return [[[token for token in head if token != EMPTY_SLOT] for head in row] for row in rows]


def kept_counts(cache: CompressedCache) -> Tensor:
    """(layers, rows, KV heads): how many prompt tokens each keeps."""
    return torch.tensor(
        [[[len(head) for head in row] for row in kept_tokens(layer)] for layer in cache.compressed_layers]
    )


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Words that are the numbers of their tokens, with a chat template. Shared: leave it as it is."""
    return build_tokenizer()


def build_tokenizer(first: int = 3) -> PreTrainedTokenizerBase:
    """A new one, in which the word '3' is the token `first`, and so on."""
    numbers = {str(3 + token - first): token for token in range(first, VOCAB_SIZE)}
    built = Tokenizer(models.WordLevel({"<pad>": PAD, "<begin>": 1, "<end>": 2} | numbers, unk_token="3"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "<begin> {% for one in messages %}{{ one['content'] }} <end> {% endfor %}4 5"
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, eos_token="<end>", pad_token="<pad>")


def random_words(num_words: int, seed: int = 0) -> str:
    """Text of as many tokens."""
    return " ".join(map(str, random_tokens(num_words, seed=seed)[0].tolist()))


def random_tokens(num_tokens: int, batch_size: int = 1, seed: int = 0) -> Tensor:
    """(batch_size, num_tokens), free of padding."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB_SIZE, (batch_size, num_tokens), generator=generator, device="cpu").to(DEVICE)


def generate(
    model: PreTrainedModel, prompt: Tensor, cache: Cache | None = None, *, max_new_tokens: int = 10, **options: Any
) -> Tensor:
    """The new tokens only; greedy unless told otherwise."""
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **options}
    if cache is not None:
        options["past_key_values"] = cache
    sequences = model.generate(prompt, max_new_tokens=max_new_tokens, **options)
    return sequences[:, prompt.shape[1] :]


@torch.no_grad()
def read(
    model: PreTrainedModel, cache: Cache, sequence: Tensor, steps: list[int], attention_mask: Tensor | None = None
) -> Tensor:
    """Feed what `cache` has not seen of `sequence`, `steps[i]` tokens at a time: (B, sum(steps), vocab) logits."""
    logits = []
    for num_new in steps:
        start = cache.get_seq_length()
        end = start + num_new
        masks = {}
        if attention_mask is not None:
            masks = {
                "attention_mask": attention_mask[:, :end],
                "position_ids": position_ids(attention_mask)[:, start:end],
            }
        output = model(input_ids=sequence[:, start:end], use_cache=True, **masks, **{CACHE: cache})
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions in left-padded rows, as `generate` counts them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and attention mask of rows (1, length) each."""
    num_tokens = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (num_tokens - row.shape[1], 0), value=PAD) for row in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(row), (num_tokens - row.shape[1], 0)) for row in rows]
    return torch.cat(padded), torch.cat(masks)
