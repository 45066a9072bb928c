"""A model of random weights that vLLM loads from a folder, with its profile beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresskv.models.checkpoint import checkpoint_fingerprint
from compresskv.models.embedded import ensure_embedded
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile

VOCAB_SIZE = 500
LONGEST = 600
"""Tokens of a prompt for which the pool of `small_engine_options` has no room beside a copy."""
LONGEST_IN_CHUNKS = 1000
"""Tokens that such a prompt has room for with its end in front of each cut, and an answer."""
NUM_LAYERS, NUM_HEADS = 3, 4


def make_random_model(folder: Path, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """4 query heads, 2 KV heads; `folder` gets it and profile.json."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        initializer_range=0.1,  # attention is far from even, so that what a cache holds shows in the answer
    )
    network = LlamaForCausalLM(config).eval()
    network.save_pretrained(folder)
    even = (1 / NUM_LAYERS,) * NUM_LAYERS
    scores = tuple(tuple(row) for row in torch.rand(NUM_LAYERS, NUM_HEADS).tolist())
    layers = tuple(range(NUM_LAYERS))
    profile = Profile("tiny", checkpoint_fingerprint(folder), layers, scores, None, 1, {"even": even}, even)
    write_profile(profile, folder / "profile.json")
    return network


def readable_engine_options(folder: Path, **compresskv: Any) -> dict[str, Any]:
    """Of an engine with such a model that reads the embedded model's tokens: quicker than that by far.

    Args:
        compresskv: the plugin's settings; without any it is switched off.
    """
    embedded = ensure_embedded("smollm2-135m")
    if not (folder / "profile.json").exists():
        for path in embedded.glob("*token*"):
            shutil.copy(path, folder)
        make_random_model(folder, json.loads((embedded / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    settings = compresskv | {"profile": str(folder / "profile.json")} if compresskv else None
    return {"compresskv": settings, "model": str(folder)}


def small_engine_options(folder: Path) -> dict[str, Any]:
    """Of an engine with such a model, which cuts prompts to 40 tokens: a pool of 23 blocks, chunks of 100 tokens."""
    make_random_model(folder)
    return {
        "compresskv": {"budget": 40, "profile": str(folder / "profile.json")},
        "model": str(folder),
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_model_len": LONGEST + 100,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 100,
        "num_gpu_blocks_override": 24,
    }


CHUNKS = {"chunk_budget": 64, "chunk_tokens": 96}
DECODING = {"decode_budget": 48, "decode_interval": 16}


def chunked_engine_options(folder: Path) -> dict[str, Any]:
    """Of such an engine whose prompts are cut while they are read: a pool of 10 blocks, half of the longest prompt."""
    options = small_engine_options(folder)
    options["compresskv"] |= CHUNKS
    return options | {"num_gpu_blocks_override": 11, "max_model_len": LONGEST_IN_CHUNKS}
