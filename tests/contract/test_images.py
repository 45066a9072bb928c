"""Prompts with real images in models of images and text: their tokens are evicted like others, positions stay right."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import compresskv
import shrunk
import tiny
from compresskv.cache.stores import packed, retain
from oracle import Evictions, evictions, masking
from rounding_store import rounding

NUM_PROMPT = 90
BUDGET = 24
NUM_NEW = 6
TURN = slice(10, 15)
END = 2
LAST_TEXT = tiny.VOCAB_SIZE - shrunk.NUM_SPECIAL - 1

# what makes images of few tokens, and lets the vision part of so few layers use what its default would in many
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},  # images attend to themselves in both directions
    "llava": {},
    "qwen2_5_vl": {"vision_config": {"fullatt_block_indexes": [1]}},  # a token's positions: time, height, width
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
}


def images_for(model: PreTrainedModel) -> tuple[list[int], dict[str, Tensor]]:
    """How many tokens each of two images takes, and what the model is given of them."""
    vision: Any = model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    if not hasattr(vision, "temporal_patch_size"):
        return [4, 4], {"pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)}
    grid = torch.tensor([[1, 8, 8], [1, 4, 8]])
    num_patches = grid.prod(-1)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(num_patches.sum()), patch, generator=generator)
    return (num_patches // 4).tolist(), {"pixel_values": pixels, "image_grid_thw": grid}


def prompt_for(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """(1, NUM_PROMPT) tokens with two images among text, and the images."""
    counts, given = images_for(model)
    config: Any = model.config
    prompt = tiny.random_tokens(NUM_PROMPT).clamp(max=LAST_TEXT)
    start = 9
    for count in counts:
        prompt[0, start - 1] = getattr(config, "vision_start_token_id", prompt[0, start - 1])
        prompt[0, start : start + count] = config.image_token_id
        start += count + 13
    return prompt, given


def with_types(model: PreTrainedModel, sequence: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of one whole reading: where a class wants to be told which tokens are of images, it is."""
    kinds = (sequence == model.config.image_token_id).int()
    wanted = inspect.signature(type(model).forward).parameters
    names = [name for name in ("token_type_ids", "mm_token_type_ids") if name in wanted]
    return {"input_ids": sequence, "attention_mask": torch.ones_like(sequence), **given, **dict.fromkeys(names, kinds)}


@torch.no_grad()
def reference(model: PreTrainedModel, sequence: Tensor, given: dict[str, Tensor], evicted: Evictions) -> Tensor:
    """Logits from the prompt's last token on, of the plain model without a cache."""
    twin = copy.deepcopy(model)  # some types keep the positions of the last prompt on the model
    with masking(twin, evicted):
        output = twin(**with_types(twin, sequence, given), use_cache=False)
    return output.logits[:, NUM_PROMPT - 1 :]


@torch.no_grad()
def generated(model: PreTrainedModel, cache: Any, prompt: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """An answer and a later turn of several tokens: the sequence, and its logits from the prompt's last token on."""
    output = model.generate(
        **with_types(model, prompt, given),
        past_key_values=cache,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[END, *range(LAST_TEXT + 1, tiny.VOCAB_SIZE)],
    )
    turn = torch.cat([output.sequences[:, -1:], prompt[:, TURN].clamp(max=LAST_TEXT)], dim=1)
    later = model(input_ids=turn, past_key_values=cache, use_cache=True)
    sequence = torch.cat([output.sequences, turn[:, 1:]], dim=1)
    return sequence, torch.cat([torch.stack(output.logits, dim=1), later.logits], dim=1)


@pytest.mark.parametrize("model_type", CHANGES)
@pytest.mark.filterwarnings("ignore:.*generation flags.*:UserWarning")
def test_they_are_read_and_evicted_like_text(model_type: str) -> None:
    model = shrunk.build(model_type, **CHANGES[model_type]).to(tiny.DEVICE)
    prompt, given = prompt_for(model)
    sequence, plain = generated(model, DynamicCache(config=model.config), prompt, given)
    scale = plain.std()
    assert (plain - reference(model, sequence, given, {})).abs().max() < 1e-3 * scale
    blank = {**given, "pixel_values": torch.zeros_like(given["pixel_values"])}
    assert (plain - reference(model, sequence, blank, {})).abs().max() > 0.1 * scale
    for method in ("full", "snapkv", "adakv", "blend"):
        with compresskv.compressing(model, method, BUDGET, **tiny.options_for(model, method)) as cache:
            sequence, logits = generated(model, cache, prompt, given)
            evicted = evictions(cache)
        assert bool(evicted) == (method != "full")
        expected = reference(model, sequence, given, evicted)
        assert (logits - expected).abs().max() < 1e-3 * scale, method
        assert method == "full" or (logits - plain).abs().max() > 0.1 * scale, method


@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("model_type", CHANGES)
@pytest.mark.filterwarnings("ignore:.*generation flags.*:UserWarning")
def test_they_are_packed_like_text(model_type: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    model = shrunk.build(model_type, **CHANGES[model_type]).to(tiny.DEVICE)
    prompt, given = prompt_for(model)
    found = []
    for kind in (retain.PACKED_STORES[store], rounding(store)):
        monkeypatch.setitem(retain.PACKED_STORES, store, kind)
        with compresskv.compressing(model, "adakv", BUDGET, store=store) as cache:
            found.append(generated(model, cache, prompt, given))
        assert {type(layer.store) for layer in cache.compressed_layers} == {kind}
    (sequence, logits), (wanted, expected) = found
    assert torch.equal(sequence, wanted)
    assert (logits - expected).abs().mean() < 1e-3 * expected.std()
