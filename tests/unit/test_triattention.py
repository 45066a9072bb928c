"""TriAttention: scores beside their formula written out, and the centres of queries that they need."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import compresskv
import tiny
from compresskv.attention.routing import routing
from compresskv.calibration.centres import find_centres
from compresskv.errors import ModelError, ProfileError
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.rkv import RKV
from compresskv.methods.rkv_ahead import RKVAhead
from compresskv.methods.triattention import TriAttention
from compresskv.models.rotary import Rotations, rotation_of
from compresskv.models.shape import compressible_layers
from compresskv.profiles.packing import packed
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.store import write_profile
from compresskv.selection.centres import CentreSums
from compresskv.selection.rotation import AHEAD, Turns

NUM_KV_HEADS, GROUPS, HEAD_DIM, BASE = 2, 3, 8, 100.0


def profile_of(centres: list[Tensor]) -> Profile:
    """The tiny model's, with these centres (H_q, 2, D) in its layers."""
    model = tiny.tiny_model("llama")
    return replace(
        tiny.random_profile(model), query_centres=tuple(packed(one.flatten().tolist(), 16) for one in centres)
    )


def some_queries(num_tokens: int = 50, seed: int = 0) -> Tensor:
    """(H_q, n, D) around centres, before they are turned."""
    generator = torch.Generator().manual_seed(seed)
    heads = NUM_KV_HEADS * GROUPS
    return torch.randn(heads, 1, HEAD_DIM, generator=generator) * 2 + torch.randn(
        heads, num_tokens, HEAD_DIM, generator=generator
    )


def written_out(
    queries: Tensor, keys: Tensor, positions: np.ndarray, num_read: int, scale: float = 1.0, furthest: int = 65536
) -> np.ndarray:
    """(H_kv, n): eqs. 6 to 13 over complex bands, of queries (H_q, m, D) and keys (H_kv, n, D) before they turn."""
    half = HEAD_DIM // 2
    turns = BASE ** (-np.arange(half) / half)
    bands = [
        states.double().numpy()[..., :half] + 1j * states.double().numpy()[..., half:] for states in (queries, keys)
    ]
    scores = []
    for kv_head in range(NUM_KV_HEADS):
        own = []
        for head in range(kv_head * GROUPS, (kv_head + 1) * GROUPS):
            centre, norms = bands[0][head].mean(axis=0), np.abs(bands[0][head]).mean(axis=0)
            concentration = np.abs(centre) / norms
            found = np.zeros(len(positions))
            offsets = [2**n for n in range(17) if 2**n <= furthest]
            for token, position in enumerate(positions):
                key = bands[1][kv_head, token]
                phase = np.angle(centre) - np.angle(key)
                for offset in offsets:
                    distance = num_read - 1 - position + offset
                    series = np.abs(centre) * np.abs(key) * np.cos(turns * distance + phase)
                    norm = (1 - concentration) * norms * np.abs(key)
                    found[token] += scale**2 * (series + norm).sum() / len(offsets)
            own.append((found - found.mean()) / found.std())
        scores.append(np.max(own, axis=0))
    return np.array(scores)


def some_turns(scale: float = 1.0) -> Turns:
    """Half of a head's dimensions turn with the other half."""
    half = HEAD_DIM // 2
    angles = BASE ** -(torch.arange(half, dtype=torch.float64) / half)
    partner = torch.tensor([*range(half, HEAD_DIM), *range(half)])
    sign = torch.tensor([-1.0] * half + [1.0] * half)
    return Turns(angles.repeat(2), torch.full((HEAD_DIM,), scale), partner, sign)


def centres_of(queries: Tensor, turns: Turns) -> Tensor:
    sums, rotation = CentreSums(), turns.at(torch.tensor([0]))
    for piece in queries.split(20, dim=1):
        sums.add(piece, rotation)
    return sums.solve(rotation)


def inputs_of(keys: Tensor, **options: Any) -> LayerInputs:
    """Keys (B, H_kv, n, D)."""
    window = keys.new_zeros(len(keys), NUM_KV_HEADS * GROUPS, 0, HEAD_DIM)
    return LayerInputs(0, window, keys, keys, 1.0, **options)


@pytest.mark.parametrize(("scale", "furthest"), [(1.0, 65536), (1.3, 100)])
def test_scores_equal_the_formula_whatever_was_evicted_before(scale: float, furthest: int) -> None:
    """Of a text of 300 tokens, of which some are held; the second row has 40 of padding."""
    turns, queries = some_turns(scale), some_queries()
    method = TriAttention(num_sinks=0, furthest=furthest).with_profile(profile_of([centres_of(queries, turns)] * 4))
    generator, num_read = torch.Generator().manual_seed(1), [300, 260]
    before = torch.randn(2, NUM_KV_HEADS, 12, HEAD_DIM, generator=generator)
    positions = [torch.randperm(count, generator=generator)[:12].sort().values for count in num_read]
    keys = torch.stack(
        [turns.at(own).turned(one, torch.arange(12)) for own, one in zip(positions, before, strict=True)]
    )
    ahead = tuple(turns.at(torch.tensor(AHEAD) + count - 1) for count in num_read)
    scores = method.score(inputs_of(keys, ahead=ahead))
    for row in range(2):
        expected = written_out(queries, before[row], positions[row].numpy(), num_read[row], scale, furthest)
        np.testing.assert_allclose(scores[row].numpy(), expected, atol=5e-3)
    used = torch.arange(12) >= torch.tensor([[0], [5]])
    padded, alone = (
        method.score(inputs_of(keys, ahead=ahead, valid=used)),
        method.score(inputs_of(keys[1:, :, 5:], ahead=ahead[1:])),
    )
    torch.testing.assert_close(padded[1:, :, 5:], alone)
    assert torch.isinf(
        TriAttention(num_sinks=2, profile=method.profile).score(inputs_of(keys, ahead=ahead))[..., :2]
    ).all()


def test_scores_depend_on_distances_alone() -> None:
    """The same keys at places further on, seen from as much further on."""
    turns = some_turns()
    method = TriAttention(num_sinks=0).with_profile(profile_of([centres_of(some_queries(), turns)] * 4))
    before = torch.randn(1, NUM_KV_HEADS, 12, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    first, second = (
        method.score(
            inputs_of(
                turns.at(torch.arange(12) + start).turned(before, torch.arange(12)),
                ahead=(turns.at(torch.tensor(AHEAD) + 11 + start),),
            )
        )
        for start in (0, 5000)
    )
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_without_rotary_embeddings_the_mean_query_s_logit_counts() -> None:
    """And, weighed by their scatter, the sizes of what keys have in each dimension."""
    queries = some_queries(200)
    sums = CentreSums()
    sums.add(queries, None)
    centres = sums.solve(None)
    torch.testing.assert_close(centres[:, 0], queries.mean(dim=1))
    torch.testing.assert_close(centres[:, 1], queries.abs().mean(dim=1) - queries.mean(dim=1).abs())
    method = TriAttention(num_sinks=0).with_profile(profile_of([centres] * 4))
    keys = torch.zeros(1, NUM_KV_HEADS, 5, HEAD_DIM)
    keys[0, :, 3] = queries.mean(dim=1)[::GROUPS]
    assert method.score(inputs_of(keys)).argmax(dim=-1).tolist() == [[3, 3]]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama_mha"])
def test_turns_tell_every_position(family: str) -> None:
    model = tiny.tiny_model(family)
    positions = torch.tensor([0, 1, 17, 400, 70_000])
    for layer_idx in compressible_layers(model):
        expected = rotation_of(model, layer_idx, positions)
        told = rotation_of(model, layer_idx, torch.tensor([1, 17]))
        assert expected is not None
        assert told is not None
        found = Turns.told_by(told).at(positions)
        for name in ("cos", "sin"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-2, rtol=0)
        (ahead,) = Rotations(model).ahead(layer_idx, 20, torch.zeros(1))
        torch.testing.assert_close(ahead.cos, Turns.told_by(told).at(torch.tensor(AHEAD) + 19).cos)


def test_centres_are_those_of_the_queries_before_they_turn() -> None:
    """Of two texts, the second of which is read in pieces."""
    model, seen = tiny.tiny_model("llama"), dict[int, list[Tensor]]()
    texts = [tiny.random_tokens(30)[0].tolist(), tiny.random_tokens(45, seed=1)[0].tolist()]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, given, output, layer_idx=layer_idx: seen.setdefault(layer_idx, []).append(output[0])
        )
        for layer_idx, layer in enumerate(model.model.layers)
    ]
    try:
        with routing(model):
            found = find_centres(model, texts, lambda *_: None)
    finally:
        for hook in hooks:
            hook.remove()
    profile = replace(tiny.random_profile(model), query_centres=found)
    for layer_idx, parts in seen.items():
        queries = torch.cat(parts).view(75, 6, 8)
        bands = torch.complex(queries[..., :4], queries[..., 4:])
        own = torch.tensor(profile.query_centres_of(layer_idx)).view(6, 2, 8)
        torch.testing.assert_close(own[:, 0], queries.mean(dim=0), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(
            own[:, 1, :4], bands.abs().mean(dim=0) - bands.mean(dim=0).abs(), atol=2e-3, rtol=2e-3
        )
        assert not own[:, 1, 4:].any()


def test_an_answer_is_cut_as_the_formula_says() -> None:
    """By the positions that follow what was read: keys of a full cache, turned back, give the same choice."""
    model, num_prompt, interval, budget = tiny.tiny_model("llama"), 20, 12, 16
    sequence = tiny.random_tokens(num_prompt + interval)
    profile, method = tiny.random_profile(model), TriAttention(num_sinks=0)
    options = {"decode_budget": budget, "decode_interval": interval, "decode_method": method, "profile": profile}
    full = DynamicCache(config=model.config)
    tiny.read(model, full, sequence, [num_prompt + interval])
    with compresskv.compressing(model, "snapkv", 1.0, **options) as cache:
        tiny.read(model, cache, sequence, [num_prompt, *[1] * interval])
        kept = [layer.positions for layer in cache.compressed_layers]
    num_read, angles = num_prompt + interval, model.model.rotary_emb.inv_freq.double()
    places = torch.arange(num_read)[:, None]
    for layer_idx, own in enumerate(kept):
        keys = full.layers[layer_idx].keys[0].double()
        bands = torch.complex(keys[..., :4], keys[..., 4:])
        centres = torch.tensor(profile.query_centres_of(layer_idx)).double().view(6, 2, 8)
        scores = torch.zeros(6, num_read, dtype=torch.float64)
        for head in range(6):
            centre = torch.complex(centres[head, 0, :4], centres[head, 0, 4:])
            untwisted = bands[head // 3] * torch.exp(-1j * places * angles)
            for offset in AHEAD:
                turned = torch.exp(1j * angles * (num_read - 1 + offset - places))
                scores[head] += (centre * turned * untwisted.conj()).real.sum(dim=-1) / len(AHEAD)
            scores[head] += bands[head // 3].abs() @ (centres[head, 1, :4] + centres[head, 1, 4:])
        scores = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, correction=0, keepdim=True)
        best = scores.view(2, 3, -1).amax(dim=1).topk(budget).indices.sort().values
        assert own[0].tolist() == best.tolist()


def test_the_better_of_two_ranks_decides() -> None:
    """Of R-KV's and TriAttention's; the other one where they are equal; padding counts for nothing."""
    model, generator = tiny.tiny_model("llama"), torch.Generator().manual_seed(3)
    query, keys = (torch.randn(2, heads, size, HEAD_DIM, generator=generator) for heads, size in ((6, 8), (2, 40)))
    valid = torch.arange(40) >= torch.tensor([[0], [13]])
    profile = tiny.random_profile(model)
    layer = LayerInputs(0, query, keys, keys, 0.4, valid=valid)
    found = RKVAhead(num_sinks=2, furthest=64, profile=profile).score(layer)
    own = RKV(num_sinks=0).score(layer), TriAttention(num_sinks=0, furthest=64, profile=profile).score(layer)
    for row, start in ((0, 0), (1, 13)):
        for head in range(NUM_KV_HEADS):
            first, second = (scores[row, head, start:].argsort().argsort().tolist() for scores in own)
            ranked = sorted(range(2, 40 - start), key=lambda t: sorted((first[t], second[t]), reverse=True))
            assert found[row, head, start + 2 :].argsort().add(2).tolist() == ranked
        assert torch.isinf(found[row, :, start : start + 2]).all()


def test_answers_are_cut_by_what_the_profile_allows() -> None:
    model, profile = tiny.tiny_model("llama"), tiny.random_profile(tiny.tiny_model("llama"))
    for given, expected in ((profile, "rkv_ahead"), (replace(profile, query_centres=None), "rkv")):
        with compresskv.compressing(model, "adakv", 20, decode_budget=20, decode_interval=12) as cache:
            assert cache.compressed_layers[0].generated.method.name == "rkv"
        for method in ("blend", "adakv"):
            with compresskv.compressing(
                model, method, 20, profile=given, decode_budget=20, decode_interval=12
            ) as cache:
                assert cache.compressed_layers[0].generated.method.name == expected


def test_a_model_that_no_profile_can_be_of_needs_none_for_its_answers() -> None:
    model = tiny.build_model("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))  # so that it has no fingerprint
    with pytest.raises(ModelError, match="NaN"):
        compresskv.compressing(model, "blend", 20)
    with compresskv.compressing(model, "adakv", 20, decode_budget=20, decode_interval=12) as cache:
        assert cache.compressed_layers[0].generated.method.name == "rkv"


def test_a_profile_of_older_releases_is_read_and_refused_by_name(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    profile = tiny.random_profile(model)
    write_profile(profile, tmp_path / "new.json")
    assert read_profile(tmp_path / "new.json") == profile
    old = replace(profile, query_centres=None)
    data = old.to_dict()
    assert "query_centres" not in data
    assert Profile.from_dict(data) == old
    for options in (
        {"method": "triattention", "profile": old},
        {"method": "snapkv", "decode_budget": 20, "decode_method": "triattention", "profile": old},
    ):
        with pytest.raises(ProfileError, match=r"^the profile of tiny holds no centres.*'triattention'.*MODEL'$"):
            compresskv.compressing(model, **options)


@pytest.mark.parametrize(
    ("centres", "match"),
    [
        (("AAA",) * 4, "16-bit floats in base64"),
        ((packed([1.0], 16),) * 2, "2 layers instead of 4"),
        ((packed([float("inf")], 16),) * 4, "NaN or infinite"),
    ],
)
def test_centres_that_cannot_be_used_are_refused(centres: tuple[str, ...], match: str) -> None:
    with pytest.raises(ProfileError, match=f"'query_centres' .*{match}"):
        replace(tiny.random_profile(tiny.tiny_model("llama")), query_centres=centres)
