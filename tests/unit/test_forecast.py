"""The forecast of a replay: its regression, its weights in a profile, and what it keeps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import compresskv
import planted
import tiny
from compresskv.attention.routing import routing
from compresskv.calibration.replays import fit_replays
from compresskv.errors import ProfileError
from compresskv.methods.forecast import Forecast
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.kvzip import KVzip
from compresskv.models.rotary import Rotations
from compresskv.models.shape import compressible_layers
from compresskv.plans.capture import CapturedPrompt
from compresskv.profiles.packing import packed
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.store import write_profile
from compresskv.selection.forecast import LEAST, RIDGE, Regression, replay_features

NUM_LAYERS = len(compressible_layers(tiny.tiny_model("llama")))


def some_states(num_heads: int = 2, num_tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_heads, num_tokens, 6, generator=generator) + 1
    return keys, torch.randn(num_heads, num_tokens, 4, generator=generator) * 3


def test_features_are_what_they_are_said_to_be() -> None:
    keys, values = some_states(num_tokens=9)
    features = replay_features(keys, values)
    assert features.shape == (2, 9, 6 + 4 + 9)
    for head in range(2):
        own, worth = keys[head].double().numpy(), values[head].double().numpy()
        lengths, sizes = np.linalg.norm(own, axis=1), np.linalg.norm(worth, axis=1)
        mean = (own / lengths[:, None]).mean(axis=0)
        likeness = own @ mean / lengths / np.linalg.norm(mean)
        place = [[np.log(at + 1), np.log(9 - at), at / 9, 1] for at in range(9)]
        columns = np.stack([lengths, sizes, np.log(lengths), np.log(sizes), likeness], axis=1)
        expected = np.concatenate([own, worth, columns, place], axis=1)
        np.testing.assert_allclose(features[head].numpy(), expected, atol=1e-5)


def test_the_regression_in_parts_is_ridge_regression_on_standardised_features() -> None:
    features = replay_features(*some_states())
    replayed = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) ** 6
    regression = Regression()
    for part in (slice(0, 120), slice(120, 300)):
        regression.add(features[:, part], replayed[:, part])
    weights = regression.solve()
    for head in range(2):
        x, y = features[head, :, :-1].double().numpy(), replayed[head].clamp(min=LEAST).log().double().numpy()
        z = (x - x.mean(axis=0)) / x.std(axis=0)
        solved = np.linalg.solve(z.T @ z / 300 + RIDGE * np.eye(z.shape[1]), z.T @ (y - y.mean()) / 300)
        np.testing.assert_allclose(features[head].numpy() @ weights[head].numpy(), z @ solved + y.mean(), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_text_that_was_learnt_is_ranked_nearly_as_its_replay_ranks_it(family: str) -> None:
    model, layers = tiny.tiny_model(family), compressible_layers(tiny.tiny_model(family))
    texts = [tiny.random_tokens(400, seed=seed)[0].tolist() for seed in range(3)]
    with routing(model):
        weights = fit_replays(model, texts, lambda *_: None)
        captured = CapturedPrompt(model, 1)
        captured.read(texts[0])
        replayed = captured.replayed
    profile = replace(tiny.random_profile(model), replay_weights=weights)
    method = Forecast().with_profile(profile)
    correlations = []
    for layer, truth in zip(captured.cache.routed, replayed, strict=True):
        keys, values = layer.stored()
        rotation = Rotations(model).of(layer.layer_idx, 400, keys.device)
        scores = method.score(LayerInputs(layer.layer_idx, keys[:, :, :0], keys, values, 1.0, rotation=rotation))
        for own, wanted in zip(scores[0, :, 4:], truth[0, :, 4:].clamp(min=LEAST).log(), strict=True):
            correlations.append(float(torch.corrcoef(torch.stack([own, wanted]))[0, 1]))
    assert len(correlations) == len(layers) * 2
    assert sum(correlations) / len(correlations) > 0.4


def test_rows_of_a_padded_batch_are_scored_as_they_are_alone() -> None:
    model = tiny.tiny_model("llama")
    keys, values = (states[None].expand(2, -1, -1, -1) for states in some_states(num_tokens=20))
    profile = replace(
        tiny.random_profile(model), replay_weights=(packed(torch.linspace(-1, 1, 38).tolist()),) * NUM_LAYERS
    )
    valid = torch.arange(20) >= torch.tensor([[0], [7]])
    method = Forecast(profile=profile)
    scores = method.score(LayerInputs(0, keys[:, :, :0], keys, values, 1.0, valid=valid))
    alone = method.score(LayerInputs(0, keys[1:, :, :0], keys[1:, :, 7:], values[1:, :, 7:], 1.0))
    torch.testing.assert_close(scores[1:, :, 7:], alone)


def test_a_profile_without_weights_is_refused_and_one_with_them_comes_back_from_its_file(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    old = replace(tiny.random_profile(model), replay_weights=None)
    with pytest.raises(ProfileError, match=r"tiny was made before method 'forecast'.*compresskv profile MODEL"):
        compresskv.compressing(model, "forecast", 9, profile=old)
    numbers = torch.randn(NUM_LAYERS, 8, generator=torch.Generator().manual_seed(0)).tolist()
    profile = replace(old, replay_weights=tuple(map(packed, numbers)))
    write_profile(profile, tmp_path / "profile.json")
    again = read_profile(tmp_path / "profile.json")
    assert again == profile
    assert again.digest != old.digest
    assert again.replay_weights_of(profile.layer_indices[1]) == pytest.approx(numbers[1])
    data = profile.to_dict()
    del data["replay_weights"]
    assert Profile.from_dict(data) == old, "of an older release"


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (("AAAA",) * NUM_LAYERS, "32-bit floats in base64"),
        (("?",) * NUM_LAYERS, "32-bit floats in base64"),
        ((packed([1.0]),) * 2, f"2 layers instead of {NUM_LAYERS}"),
        ((packed([float("nan")]),) * NUM_LAYERS, "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights: tuple[str, ...], match: str) -> None:
    with pytest.raises(ProfileError, match=match):
        replace(tiny.random_profile(tiny.tiny_model("llama")), replay_weights=weights)


def test_a_planted_needle_is_forecast_from_other_needles() -> None:
    """The planted keys say which word of a needle each is: what replays of some texts look at is known in any other."""
    model, tokenizer = planted.build(noise=0.002)
    sentences = planted.haystack_sentences(60)
    texts = []
    for seed in range(2):
        own = sentences[25 * seed : 25 * seed + 25]
        for place, topic in enumerate(planted.TOPICS):
            own.insert(4 * place + seed, planted.needle(topic))
        texts.append(tokenizer(" ".join(own))["input_ids"])
    with routing(model):
        weights = fit_replays(model, texts, lambda *_: None)
        captured = CapturedPrompt(model, 1)
        other = sentences[50:]
        other.insert(5, planted.needle("delta"))
        captured.read(tokenizer(" ".join(other))["input_ids"])
        profile = replace(tiny.random_profile(model), replay_weights=weights)
        kept = [
            {
                (layer.layer_idx, head, token)
                for layer in captured.compress(method, 0.15).compressed_layers
                for head, tokens in enumerate(tiny.kept_tokens(layer)[0])
                for token in tokens
            }
            for method in (KVzip(), Forecast(profile=profile))
        ]
    assert len(kept[0]) == len(kept[1])
    assert len(kept[0] & kept[1]) > 0.6 * len(kept[0])
