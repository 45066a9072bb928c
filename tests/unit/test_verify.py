"""The masking ablation: masking what retrieves destroys retrieval, masking anything else does not."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import planted
import tiny
from compresskv.attention.routing import routing
from compresskv.cache.full import FullCache
from compresskv.calibration import verify
from compresskv.calibration.needles import NeedleDocument, read_needles, split_needles
from compresskv.calibration.recording import MaskedLayer
from compresskv.calibration.verify import Ablation, VerifySettings, to_rows, verify_profile
from compresskv.errors import ConfigError, DataError, ProfileError
from compresskv.models.decoding import prefill
from compresskv.models.fingerprint import fingerprint
from compresskv.models.shape import decoder_config
from compresskv.profiles.profile import Profile, Rows

Head = tuple[int, int]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> VerifySettings:
    """Two documents of four needles: 8 cases."""
    folder = tmp_path_factory.mktemp("planted")
    return VerifySettings(
        counts=(1, 2, 3),
        length=256,
        num_documents=2,
        random_draws=1,
        max_new_tokens=12,
        haystack=(str(planted.write_haystack(folder / "haystack.txt")),),
        needles=str(planted.write_needles(folder / "needles.json")),
    )


def ranking(first: list[Head]) -> Rows:
    """Scores by which `first` rank first, in that order, and all others behind."""
    scores = [[0.0] * planted.NUM_HEADS for _ in range(planted.NUM_LAYERS)]
    for rank, (layer, head) in enumerate(first):
        scores[layer][head] = 10.0 - rank
    return tuple(map(tuple, scores))


def profile_of(semantic: list[Head], traditional: list[Head] | None = None) -> Profile:
    return Profile(
        model_id="planted",
        fingerprint=fingerprint(planted.model()),
        layer_indices=(0, 1, 2),
        semantic_scores=ranking(semantic),
        traditional_scores=None if traditional is None else ranking(traditional),
        num_runs=1,
        layer_errors_by_set={},
        layer_errors=(0.2, 0.4, 0.4),
    )


def accuracies(ablations: list[Ablation], group: str) -> list[float]:
    return [one.accuracy for one in ablations if one.group == group]


@pytest.fixture(scope="module")
def ablations(settings: VerifySettings) -> list[Ablation]:
    profile = profile_of([planted.WIDE, *planted.COPYING], [*planted.COPYING, planted.WIDE])
    return verify_profile(planted.model(), planted.tokenizer(), profile, settings)


class TestMasking:
    def test_the_whole_model_answers(self, ablations: list[Ablation]) -> None:
        assert ablations[0] == Ablation("none", 0, 8, 8)

    def test_masking_the_planted_heads_destroys_retrieval(self, ablations: list[Ablation]) -> None:
        """Either copying head is enough; without both nothing is left."""
        assert accuracies(ablations, "semantic") == [1, 1, 0]
        assert accuracies(ablations, "traditional") == [1, 0, 0]

    def test_masking_all_others_does_not(self, settings: VerifySettings) -> None:
        others = [*planted.OTHERS, (0, 1), (0, 2)]  # the first layer's heads do the same thing, two are enough
        masked = replace(settings, counts=(len(others),))
        found = verify_profile(planted.model(), planted.tokenizer(), profile_of(others), masked)
        assert accuracies(found, "semantic") == [1]

    @pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
    def test_each_row_is_that_of_a_model_without_its_heads(self, attn_implementation: str) -> None:
        """The reference has no output weights for them. Both read the beginning with all heads."""
        model, _ = planted.build(attn_implementation, noise=0.002)
        head_sets: list[list[Head]] = [[], [(1, 2)], [(0, 0), (1, 1), (1, 2), (2, 1)], [(2, 0), (2, 1)]]
        tokens = torch.randint(5, 100, (1, 80), generator=torch.Generator().manual_seed(1))
        start, rest = tokens[:, :50], tokens[:, 50:]
        config = decoder_config(model)
        with routing(model), torch.no_grad():
            cache = FullCache(model, lambda layer_idx, _: MaskedLayer(layer_idx, config))
            prefill(model, start, cache)
            branch = cache.branch()
            branch.batch_repeat_interleave(len(head_sets))
            for layer in branch.routed:
                masked = [[head for layer_idx, head in heads if layer_idx == layer.layer_idx] for heads in head_sets]
                layer.mask_heads(masked, config.num_attention_heads)
            repeated = rest.expand(len(head_sets), -1)
            logits = model(input_ids=repeated, past_key_values=branch, use_cache=True).logits[:, -1]

        for row, heads in enumerate(head_sets):
            plain = DynamicCache(config=config)
            prefill(model, start, plain)
            expected = prefill(without_heads(model, heads), rest, plain)
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 50
        assert len(cache.routed[0].keys) == 1

    def test_a_model_may_only_echo_the_question(self, settings: VerifySettings, tmp_path: Path) -> None:
        """Words that the question gives away prove nothing: six of seven are not enough."""
        rows = [
            {
                "id": topic,
                "kind": "echo",
                "needle": planted.needle(topic) + " dunno dunno",
                "question": f"{planted.needle(topic)} What of {topic}?",
            }
            for topic in planted.TOPICS
        ]
        (tmp_path / "echo.json").write_text(json.dumps({"needles": rows}), encoding="utf-8")
        echo = replace(settings, needles=str(tmp_path / "echo.json"), counts=(1,))
        found = verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), echo)
        assert found[0] == Ablation("none", 0, 0, 8)

    def test_the_model_gets_its_own_attention_back(self, ablations: list[Ablation]) -> None:
        assert ablations
        assert planted.model().config._attn_implementation == "sdpa"


def without_heads(model: PreTrainedModel, heads: list[Head]) -> PreTrainedModel:
    changed: Any = copy.deepcopy(model)
    for layer, head in heads:
        attention = changed.model.layers[layer].self_attn
        attention.o_proj.weight.data[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    return changed  # type: ignore[no-any-return]


class TestTable:
    def test_has_every_kind_at_every_count(self, ablations: list[Ablation]) -> None:
        kinds = ("semantic", "traditional", "random")
        rows = [("none", 0), *((group, count) for count in (1, 2, 3) for group in kinds)]
        assert [(one.group, one.count) for one in ablations] == rows
        assert all(one.cases == 8 for one in ablations)

    def test_a_profile_without_traditional_scores_has_no_such_rows(self, settings: VerifySettings) -> None:
        few = replace(settings, counts=(1,), num_documents=1)
        found = verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), few)
        assert [one.group for one in found] == ["none", "semantic", "random"]

    def test_several_draws_of_random_heads_are_pooled(self, settings: VerifySettings) -> None:
        few = replace(settings, counts=(1,), num_documents=1, random_draws=3)
        *_, pooled = verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), few)
        assert (pooled.group, pooled.cases) == ("random", 3 * 4)

    def test_the_draw_depends_on_the_seed_alone(self, settings: VerifySettings) -> None:
        profile = profile_of([planted.WIDE])
        draws = [
            [heads for group, _, heads in verify._groups(profile, replace(settings, seed=seed)) if group == "random"]
            for seed in (0, 0, 1)
        ]
        assert draws[0] == draws[1] != draws[2]
        assert [len(set(heads)) for heads in draws[0]] == [1, 2, 3]

    def test_rows_are_json(self, ablations: list[Ablation]) -> None:
        rows = json.loads(json.dumps(to_rows(ablations)))
        assert rows[0] == {"masked": "none", "heads": 0, "successes": 8, "cases": 8, "accuracy": 1.0}
        assert len(rows) == len(ablations)

    def test_progress_ends_at_1(self, settings: VerifySettings) -> None:
        seen: list[float] = []
        few = replace(settings, counts=(1,))
        verify_profile(
            planted.model(),
            planted.tokenizer(),
            profile_of([planted.WIDE]),
            few,
            lambda _, fraction: seen.append(fraction),
        )
        assert seen == sorted(seen)
        assert (len(seen), seen[-1]) == (8, 1)


class TestWhatIsAsked:
    @pytest.fixture
    def documents(self, monkeypatch: pytest.MonkeyPatch) -> list[NeedleDocument]:
        """The documents read; nothing is answered."""
        seen: list[NeedleDocument] = []

        def answered(
            _model: Any, _tokenizer: Any, document: NeedleDocument, heads: list[Any], _tokens: int
        ) -> Iterator[list[bool]]:
            seen.append(document)
            yield from [[True] * len(heads) for _ in document.needles]

        monkeypatch.setattr(verify, "_answered", answered)
        return seen

    def test_needles_that_no_calibration_uses(self, settings: VerifySettings, documents: list[NeedleDocument]) -> None:
        own = replace(settings, needles=None, length=512)
        verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), own)
        calibrated = {needle.id for needle in split_needles(read_needles())[0]}
        asked = {needle.id for document in documents for _, needle in document.needles}
        assert asked
        assert not asked & calibrated

    def test_prompts_of_the_length_that_was_asked_for(
        self, settings: VerifySettings, documents: list[NeedleDocument]
    ) -> None:
        verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), replace(settings, length=700))
        lengths = [len(planted.tokenizer()(document.text)["input_ids"]) for document in documents]
        assert all(600 < length <= 700 - settings.max_new_tokens for length in lengths)


class TestRefusals:
    def refused(self, kind: type[Exception], match: str, settings: VerifySettings) -> None:
        with pytest.raises(kind, match=match) as caught:
            verify_profile(planted.model(), planted.tokenizer(), profile_of([planted.WIDE]), settings)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("counts", [(), (0,), (-1, 2)])
    def test_counts_of_no_head(self, settings: VerifySettings, counts: tuple[int, ...]) -> None:
        with pytest.raises(ConfigError, match=r"^counts=(0|-1) must be at least 1$"):
            replace(settings, counts=counts)

    def test_more_heads_than_there_are(self, settings: VerifySettings) -> None:
        self.refused(ConfigError, "counts=.* 12 heads", replace(settings, counts=(5, 13)))

    def test_an_imported_profile(self, settings: VerifySettings) -> None:
        """Its ranks within each layer do not say which heads are the model's best."""
        imported = replace(profile_of([planted.WIDE]), num_runs=0)
        with pytest.raises(ProfileError, match="ranks within layers") as caught:
            verify_profile(planted.model(), planted.tokenizer(), imported, settings)
        assert "\n" not in str(caught.value)

    def test_a_length_above_the_context(self, settings: VerifySettings) -> None:
        self.refused(ConfigError, "length=2049 .* 2048 tokens", replace(settings, length=2049))

    def test_a_haystack_that_is_too_short(self, settings: VerifySettings, tmp_path: Path) -> None:
        short = planted.write_haystack(tmp_path / "short.txt", 20)
        self.refused(DataError, "the haystack has", replace(settings, length=1024, haystack=(str(short),)))
