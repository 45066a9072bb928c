"""A tiny Llama whose retrieval heads are known, because every weight of it is set by hand.

It reads needles such as "amber1 amber2 amber3 amber4 amber5 amber6." and, asked "What of amber?", repeats them word by
word. A word's key says what it comes after, and a copying head's query asks for what comes after its own token:

    layer 0  every head: the assistant's token looks up which topic was asked
    layer 1  COPYING[0] puts 60 % of its attention on the next word of the needle and the rest on the first token
    layer 2  COPYING[1] the same; WIDE spreads all of its attention over the needle's six words
    the rest attend to the first token, to everything alike, or to the last few tokens

So the semantic ranking is WIDE, then COPYING; the traditional one has COPYING first. Either copying head is enough to
answer. Nothing else writes into the residual stream, and the MLPs do nothing.
"""

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

COPYING = [(1, 2), (2, 1)]
WIDE = (2, 0)
PLANTED = {WIDE, *COPYING}
OTHERS = [(layer, head) for layer in (1, 2) for head in range(4) if (layer, head) not in PLANTED]
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 3, 4, 2

TOPICS = ["amber", "birch", "cedar", "delta", "ember", "fjord"]
NUM_WORDS = 6
CONTEXT_LENGTH = 2048

_SPECIAL = ["<unk>", "<begin>", "<user>", "<end>", "<assistant>"]
_FILLER_TEXT = """
water stone field road garden tree hill sky boat lamp paper clock window table bread cloth winter summer evening
morning small large round quiet green yellow near far under over stands lies grows turns keeps moves holds opens
closes between behind the a and with
"""
_FILLER = _FILLER_TEXT.split()
_ASKED = ["What", "of", "Answer", "in", "one", "sentence", "dunno", ".", "?", ","]
_NEEDLE_WORDS = [f"{topic}{i}" for topic in TOPICS for i in range(1, NUM_WORDS + 1)]
_VOCABULARY = [*_SPECIAL, *_FILLER, *_ASKED, *TOPICS, *_NEEDLE_WORDS]
_ID = {word: index for index, word in enumerate(_VOCABULARY)}
_TEMPLATE = (
    "<begin>{% for message in messages %}<user> {{ message['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_HEAD_DIM = 64
# With this base every pair of dimensions but the first four stands still over 2,048 positions: what is written into
# them is matched by content alone. The first three pairs turn, and serve the head that looks at what is near.
_THETA = 1e38
_SLOTS = [*range(4, 32), *range(36, 64)]
_NEAR_DIMS = [0, 1, 2]
_FIRST_WORD, _NAMED, _SINK, _IS_TOPIC = 0, 36, 42, 43
"""Slots of a head: 36 for the word that follows each, 6 for the needle a word belongs to, the first token, a topic."""
_LOGIT = 20.0

# The residual stream: which token this is, which word was retrieved, which topic was asked, and a spare.
_RETRIEVED = len(_VOCABULARY)
_TOPIC = _RETRIEVED + len(_NEEDLE_WORDS)
_SPARE = _TOPIC + len(TOPICS)
_HIDDEN = (_SPARE + 1 + 7) // 8 * 8


@functools.cache
def model(attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A shared instance: leave it as it is."""
    return build()[0] if attn_implementation == "sdpa" else build(attn_implementation)[0]


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Whole words and punctuation, with a chat template. Shared: leave it as it is."""
    return _words_tokenizer()


def build(attn_implementation: str = "sdpa", noise: float = 0.0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model and its tokenizer. `noise` is the standard deviation of what is added to each attention weight."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(_VOCABULARY),
        hidden_size=_HIDDEN,
        intermediate_size=8,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        bos_token_id=_ID["<begin>"],
        eos_token_id=_ID["<end>"],
        tie_word_embeddings=False,
        dtype="float32",
    )
    built = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    _plant(built, noise)
    return built.eval().requires_grad_(False), _words_tokenizer()


def save(folder: Path, **options: Any) -> Path:
    """Write model and tokenizer as transformers does, for `--model`; returns `folder`."""
    built, its_tokenizer = build(**options)
    built.save_pretrained(folder)
    its_tokenizer.save_pretrained(folder)
    return folder


def needle(topic: str) -> str:
    """The sentence to hide."""
    return " ".join(f"{topic}{i}" for i in range(1, NUM_WORDS + 1)) + "."


def write_needles(path: Path, topics: list[str] = TOPICS) -> Path:
    """A needles file; returns `path`."""
    rows = [
        {"id": topic, "kind": "planted", "needle": needle(topic), "question": f"What of {topic}?"} for topic in topics
    ]
    path.write_text(json.dumps({"needles": rows}), encoding="utf-8")
    return path


def write_haystack(path: Path, num_sentences: int = 400) -> Path:
    """About ten tokens a sentence; returns `path`."""
    path.write_text(" ".join(haystack_sentences(num_sentences)), encoding="utf-8")
    return path


def haystack_sentences(num_sentences: int = 400) -> list[str]:
    """Sentences of 4 to 16 words that the planted model knows, and does not care about."""
    draw = random.Random(5)
    return [" ".join(draw.choices(_FILLER, k=draw.randint(4, 16))) + "." for _ in range(num_sentences)]


def bytes_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Byte-level pairs learnt from the haystack: spaces belong to words, unknown words fall into pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(haystack_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<begin>", eos_token="<end>", chat_template=chat_template
    )


def _words_tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel(_ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
        chat_template=_TEMPLATE,
    )


@torch.no_grad()
def _plant(built: Any, noise: float) -> None:
    for name, weight in built.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    built.model.embed_tokens.weight[:, : len(_VOCABULARY)] = torch.eye(len(_VOCABULARY))
    for layer_idx, layer in enumerate(built.model.layers):
        attention = layer.self_attn
        query = attention.q_proj.weight.view(NUM_HEADS, _HEAD_DIM, _HIDDEN)
        key = attention.k_proj.weight.view(NUM_KV_HEADS, _HEAD_DIM, _HIDDEN)
        value = attention.v_proj.weight.view(NUM_KV_HEADS, _HEAD_DIM, _HIDDEN)
        output = attention.o_proj.weight.view(_HIDDEN, NUM_HEADS, _HEAD_DIM)
        _plant_keys_and_values(key, value, first_layer=layer_idx == 0)
        for head in range(NUM_HEADS):
            if layer_idx == 0:
                _plant_topic_head(query[head], output[:, head])
            elif (layer_idx, head) in COPYING:
                _plant_copying_head(query[head], output[:, head])
            elif (layer_idx, head) == WIDE:
                _plant_wide_head(query[head], output[:, head])
            else:
                _plant_idle_head(query[head], output[:, head], near=head == 3)
        # Scores come out in logits whatever the norm makes of a one-hot row, and the dot product's scaling.
        attention.q_proj.weight.mul_(_LOGIT * math.sqrt(_HEAD_DIM / _HIDDEN))
        attention.k_proj.weight.mul_(1 / math.sqrt(_HIDDEN))
        attention.v_proj.weight.mul_(1 / math.sqrt(_HIDDEN))
    _plant_vocabulary(built.lm_head.weight)
    if noise:
        generator = torch.Generator().manual_seed(3)
        for name, weight in built.named_parameters():
            if "self_attn" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * noise)


def _plant_keys_and_values(key: Tensor, value: Tensor, *, first_layer: bool) -> None:
    """(H_kv, D, hidden) each; all KV heads alike."""
    key[:, _slot(_SINK), _ID["<begin>"]] = 1
    value[:, _slot(_SINK), _ID["<begin>"]] = 1
    if first_layer:
        for i, topic in enumerate(TOPICS):
            key[:, _slot(_IS_TOPIC), _ID[topic]] = 1
            value[:, _slot(_NAMED + i), _ID[topic]] = 1
        return
    key[:, _NEAR_DIMS, : len(_VOCABULARY)] = 1
    for i, word in enumerate(_NEEDLE_WORDS):
        key[:, _slot(_FIRST_WORD + i), _ID[word]] = 1
        # The needle's first word a little more, so that a wide head's peak is certain.
        key[:, _slot(_NAMED + i // NUM_WORDS), _ID[word]] = 1.01 if i % NUM_WORDS == 0 else 1.0
        value[:, _slot(_FIRST_WORD + i), _ID[word]] = 1


def _plant_topic_head(query: Tensor, output: Tensor) -> None:
    query[_slot(_SINK), : len(_VOCABULARY)] = 1
    query[_slot(_SINK), _ID["<assistant>"]] = 0
    query[_slot(_IS_TOPIC), _ID["<assistant>"]] = 1
    for i in range(len(TOPICS)):
        output[_TOPIC + i, _slot(_NAMED + i)] = 1
    output[_SPARE, _slot(_SINK)] = 0.01


def _plant_copying_head(query: Tensor, output: Tensor) -> None:
    query[_slot(_SINK), : len(_VOCABULARY)] = 1 - math.log(1.5) / _LOGIT  # the word gets 60 %, the first token 40
    query[_slot(_SINK), _ID["<assistant>"]] = 0
    for i, word in enumerate(_NEEDLE_WORDS):
        output[_RETRIEVED + i, _slot(_FIRST_WORD + i)] = 1
        if i % NUM_WORDS < NUM_WORDS - 1:
            query[_slot(_FIRST_WORD + i + 1), _ID[word]] = 1
    for i in range(len(TOPICS)):
        query[_slot(_FIRST_WORD + i * NUM_WORDS), _TOPIC + i] = 1
    output[_SPARE, _slot(_SINK)] = 0.01


def _plant_wide_head(query: Tensor, output: Tensor) -> None:
    query[_slot(_SINK), : len(_VOCABULARY)] = 0.5
    for i, word in enumerate(_NEEDLE_WORDS):
        query[_slot(_NAMED + i // NUM_WORDS), _ID[word]] = 1
        output[_SPARE, _slot(_FIRST_WORD + i)] = 0.01
    for i in range(len(TOPICS)):
        query[_slot(_NAMED + i), _TOPIC + i] = 1


def _plant_idle_head(query: Tensor, output: Tensor, *, near: bool) -> None:
    if near:
        query[_NEAR_DIMS, : len(_VOCABULARY)] = 0.3
    for i in range(len(_NEEDLE_WORDS)):
        output[_SPARE, _slot(_FIRST_WORD + i)] = 0.01
    output[_SPARE, _slot(_SINK)] = 0.01


def _plant_vocabulary(lm_head: Tensor) -> None:
    """Say the retrieved word; without one "dunno"; after a needle's last word, or "dunno", stop."""
    lm_head[_ID["dunno"], : len(_VOCABULARY)] = 3
    for i, word in enumerate(_NEEDLE_WORDS):
        lm_head[_ID[word], _RETRIEVED + i] = 20
    for word in ["dunno", *_NEEDLE_WORDS[NUM_WORDS - 1 :: NUM_WORDS]]:
        lm_head[_ID["<end>"], _ID[word]] = 60


def _slot(number: int) -> int:
    return _SLOTS[number]
