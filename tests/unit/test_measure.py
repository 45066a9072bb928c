"""The finder finds what is there: planted heads, and the numbers of independent computations of both measurements."""

import dataclasses
import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import planted
import tiny
from compresskv.attention.routing import routing
from compresskv.cache.full import FullCache
from compresskv.calibration import measure
from compresskv.calibration.find import Outcome, find_profile
from compresskv.calibration.measure import Measurement, NothingRetrievedError, mean_scores
from compresskv.calibration.needles import SUMMARY, encode_questions
from compresskv.calibration.recall import rouge_1_recall
from compresskv.calibration.recording import SpanLayer
from compresskv.calibration.runs import measuring_alone
from compresskv.calibration.settings import CalibrationSettings
from compresskv.errors import CompressKVError, ConfigError, DataError, ModelError, ProfileError
from compresskv.methods.forecast import Forecast
from compresskv.models.decoding import decode, prefill
from compresskv.models.shape import compressible_layers, decoder_config
from compresskv.profiles.profile import Rows
from compresskv.prompts.template import apply_chat_template
from compresskv.selection.precision import PRECISIONS

Planted = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings that name the planted needles and haystack."""
    folder = tmp_path_factory.mktemp("planted")
    return {
        "needles": str(planted.write_needles(folder / "needles.json")),
        "haystack": (str(planted.write_haystack(folder / "haystack.txt")),),
    }


@pytest.fixture(scope="module")
def settings(files: dict[str, Any]) -> CalibrationSettings:
    """6 documents of 2 needles: 12 runs."""
    return CalibrationSettings(lengths=(256,), depths=(20, 70), max_new_tokens=12, error_documents=1, **files)


@pytest.fixture(scope="module")
def noisy() -> Planted:
    """Noise makes every head's attention a number of its own."""
    return planted.build(noise=0.002)


@pytest.fixture(scope="module")
def outcome(settings: CalibrationSettings, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return find_profile(planted.model(), planted.tokenizer(), "planted", tmp_path_factory.mktemp("log"), settings)


def new_measurement(model: PreTrainedModel, settings: CalibrationSettings, folder: Path) -> Measurement:
    return Measurement(model, planted.tokenizer(), folder, settings, lambda *_: None)


class TestPlantedHeads:
    def test_the_planted_heads_rank_first(self, outcome: Outcome) -> None:
        profile = outcome.profile
        semantic = profile.ranked_heads(profile.semantic_scores)
        assert semantic[0] == planted.WIDE
        assert set(semantic[:3]) == planted.PLANTED
        assert profile.traditional_scores is not None
        assert set(profile.ranked_heads(profile.traditional_scores)[:2]) == set(planted.COPYING)

    def test_their_scores_are_what_was_planted_and_the_others_are_near_none(self, outcome: Outcome) -> None:
        scores = outcome.profile.semantic_scores
        # The first word with all of the attention and five with 60 % of it.
        assert [scores[layer][head] for layer, head in planted.COPYING] == pytest.approx([4.0, 4.0], abs=0.1)
        assert 5.5 < scores[planted.WIDE[0]][planted.WIDE[1]] < planted.NUM_WORDS
        others = [scores[layer][head] for layer, head in planted.OTHERS] + list(scores[0])
        assert max(others) < 0.5

    def test_traditional_scores_count_copied_tokens_only(self, outcome: Outcome) -> None:
        scores = outcome.profile.traditional_scores
        assert scores is not None
        num_tokens = planted.NUM_WORDS + 1  # the full stop is never said
        copied = [[0.0] * planted.NUM_HEADS for _ in range(planted.NUM_LAYERS)]
        for layer, head in planted.COPYING:
            copied[layer][head] = planted.NUM_WORDS / num_tokens
        copied[planted.WIDE[0]][planted.WIDE[1]] = 1 / num_tokens  # its peak is always the first word
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(copied), atol=1e-5, rtol=0)

    def test_every_planned_run_is_counted_once(self, outcome: Outcome) -> None:
        seen = [(run["needle"], run["depth"], run["length"]) for run in outcome.runs]
        assert sorted(seen) == [(topic, depth, 256) for topic in planted.TOPICS for depth in (20, 70)]
        assert all(run["succeeded"] and run["recall"] == 1 for run in outcome.runs)
        assert outcome.profile.num_runs == 12
        for run in outcome.runs:
            assert run["answer"] == planted.needle(run["needle"]).removesuffix(".")

    def test_the_profile_says_where_it_comes_from(self, outcome: Outcome, settings: CalibrationSettings) -> None:
        profile, provenance = outcome.profile, outcome.profile.provenance
        assert (profile.model_id, profile.layer_indices) == ("planted", (0, 1, 2))
        assert profile.fingerprint.weights is not None
        assert json.loads(json.dumps(provenance["settings"])) == json.loads(json.dumps(dataclasses.asdict(settings)))
        assert provenance["needles"] == planted.TOPICS
        assert re.fullmatch(r"[0-9a-f]{16}", provenance["haystack_sha256"])
        assert (provenance["runs_succeeded"], provenance["runs_failed"]) == (12, 0)
        assert set(provenance["versions"]) == {"compresskv", "transformers", "torch", "python"}

    def test_progress_goes_from_start_to_end_of_all_measurements(
        self, settings: CalibrationSettings, tmp_path: Path
    ) -> None:
        seen: dict[str, list[float]] = {}
        find_profile(
            planted.model(),
            planted.tokenizer(),
            "planted",
            tmp_path,
            settings,
            lambda what, done: seen.setdefault(what, []).append(done),
        )
        assert list(seen) == [
            "retrieval heads",
            "layer errors",
            "what a second reading attends to",
            "where queries lie",
            "what stores and shares lose",
        ]
        for fractions in seen.values():
            assert fractions == sorted(fractions)
            assert 0 < fractions[0] <= fractions[-1] == 1
        assert len(set(seen["retrieval heads"])) == 12

    def test_the_model_gets_its_own_attention_back(self, outcome: Outcome) -> None:
        assert planted.model().config._attn_implementation == "sdpa"

    def test_fewer_needles_than_depths_use_every_depth(self, files: dict[str, Any], tmp_path: Path) -> None:
        needles = planted.write_needles(tmp_path / "two.json", planted.TOPICS[:2])
        depths = (0, 30, 60, 90)
        few = CalibrationSettings(lengths=(256,), depths=depths, **{**files, "needles": str(needles)})
        found = find_profile(planted.model(), planted.tokenizer(), "planted", tmp_path / "log", few)
        seen = sorted((run["needle"], run["depth"]) for run in found.runs)
        assert seen == [(topic, depth) for topic in planted.TOPICS[:2] for depth in depths]
        assert all(run["succeeded"] for run in found.runs)


def expected_scores(
    model: PreTrainedModel, prompt: list[int], span: slice, tokens: list[int]
) -> tuple[list[list[float]], list[list[float]]]:
    """Eq. 5 and the arg-max rule, read off whole attention matrices in plain loops."""
    ids = prompt + tokens
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    needle = ids[span]
    semantic, traditional = [], []
    for layer_idx in compressible_layers(model):
        semantic_row, traditional_row = [], []
        for matrix in attentions[layer_idx][0]:
            mass = hits = 0.0
            for step, token in enumerate(tokens):
                # The query that generated this token is the one before it: the prompt's last for the first token.
                row = matrix[len(prompt) - 1 + step]
                if token in needle:
                    mass += float(row[span].sum())
                peak = int(row.argmax())
                hits += span.start <= peak < span.stop and ids[peak] == token
            semantic_row.append(mass)
            traditional_row.append(hits / len(needle))
        semantic.append(semantic_row)
        traditional.append(traditional_row)
    return semantic, traditional


def greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, end: int | None) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        eos_token_id=end,
    )
    return output[0, len(prompt) :].tolist()


class TestScoresAreThoseOfAnIndependentComputation:
    @pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
    def test_of_a_whole_calibration(
        self, noisy: Planted, settings: CalibrationSettings, tmp_path: Path, attn_implementation: str
    ) -> None:
        model, tokenizer = noisy if attn_implementation == "sdpa" else planted.build("eager", noise=0.002)
        eager, _ = planted.build("eager", noise=0.002)
        measurement = Measurement(model, tokenizer, tmp_path, settings, lambda *_: None)
        with routing(model):
            runs = measurement.measure_heads()
        assert all(run["succeeded"] for run in runs)
        checked = iter(runs)
        for _, document in list(measurement.documents())[:3]:
            for question, needle in document.questions:
                run = next(checked)
                text, _ = apply_chat_template(tokenizer, f"{document.text}\n\n{question}")
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids = tokenizer(needle, add_special_tokens=False)["input_ids"]
                (start,) = (i for i in range(len(prompt)) if prompt[i : i + len(ids)] == ids)
                tokens = greedy(eager, prompt, settings.max_new_tokens, tokenizer.eos_token_id)
                assert tokenizer.decode(tokens, skip_special_tokens=True) == run["answer"]
                semantic, traditional = expected_scores(eager, prompt, slice(start, start + len(ids)), tokens)
                torch.testing.assert_close(torch.tensor(run["semantic"]), torch.tensor(semantic), atol=2e-4, rtol=0)
                torch.testing.assert_close(torch.tensor(run["traditional"]), torch.tensor(traditional))

    @pytest.mark.parametrize(
        ("family", "attn_implementation"),
        [("gemma2", "eager"), *itertools.product(tiny.FAMILIES, tiny.ATTENTIONS)],  # sdpa has no soft cap
    )
    def test_of_every_family(self, family: str, attn_implementation: str) -> None:
        """Random models say tokens of a long span by chance."""
        model = tiny.tiny_model(family, attn_implementation)
        prompt, split, span = tiny.random_tokens(90, seed=6)[0].tolist(), 60, slice(10, 75)
        config = decoder_config(model)
        with routing(model):
            cache = FullCache(model, lambda layer_idx, _: SpanLayer(layer_idx, config))
            prefill(model, torch.tensor([prompt[:split]]), cache)
            branch = cache.branch()
            for layer in branch.routed:
                layer.start(span)
            first = int(prefill(model, torch.tensor([prompt[split:]]), branch).argmax())
            tokens = decode(model, no_end(), first, branch, 12)
        assert tokens == greedy(model, prompt, 12, None)
        semantic, traditional = measure._scores(branch.routed, prompt, span, tokens)
        expected = expected_scores(tiny.tiny_model(family, "eager"), prompt, span, tokens)
        assert torch.tensor(semantic).max() > 0.5
        torch.testing.assert_close(torch.tensor(semantic), torch.tensor(expected[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(traditional), torch.tensor(expected[1]))
        assert cache.get_seq_length() == split

    def test_a_branch_leaves_the_shared_prefix_as_it_is(
        self, noisy: Planted, settings: CalibrationSettings, tmp_path: Path
    ) -> None:
        """Each question is asked without the others: in another order the numbers are the same."""
        model, tokenizer = noisy
        _, document = next(new_measurement(model, settings, tmp_path).documents())
        config = decoder_config(model)
        results = []
        for questions in (document.questions, document.questions[::-1]):
            prefix, encoded = encode_questions(tokenizer, document, questions)
            with routing(model):
                cache = FullCache(model, lambda layer_idx, _: SpanLayer(layer_idx, config))
                prefill(model, torch.tensor([prefix]), cache)
                masses = []
                for question in encoded:
                    branch = cache.branch()
                    for layer in branch.routed:
                        layer.start(question.span)
                    first = int(prefill(model, torch.tensor([question.suffix]), branch).argmax())
                    decode(model, tokenizer, first, branch, 12)
                    masses.append([torch.stack(layer.mass) for layer in branch.routed])
            results.append(masses)
        for one, other in zip(results[0], results[1][::-1], strict=True):
            for mass, again in zip(one, other, strict=True):
                assert torch.equal(mass, again)


def no_end() -> Any:
    """Stands in for a tokenizer without an end token."""
    return SimpleNamespace(eos_token_id=None)


def test_the_mean_is_over_runs_that_succeeded() -> None:
    runs = [
        {"succeeded": True, "semantic": [[1.0, 0.0]], "traditional": [[0.5, 0.0]]},
        {"succeeded": False, "semantic": [[9.0, 9.0]], "traditional": [[9.0, 9.0]]},
        {"succeeded": True, "semantic": [[2.0, 1.0]], "traditional": [[0.0, 0.0]]},
    ]
    assert mean_scores(runs) == (((1.5, 0.5),), ((0.25, 0.0),), 2)


@pytest.mark.parametrize(
    ("answer", "recall"),
    [
        ("The key is under the stone.", 1.0),
        ("UNDER THE STONE, the key is!", 1.0),
        ("It is under a stone", 0.6),
        ("the the the", 0.2),
        ("", 0.0),
        (" ... ", 0.0),
        ("never", 0.0),
    ],
)
def test_recall_of_the_needles_words(answer: str, recall: float) -> None:
    assert rouge_1_recall(answer, "The key is under the stone.") == pytest.approx(recall)


# Layer errors ------------------------------------------------------------------------------------------------------


class Captured:
    """What each attention module of a Llama was given, and what it gave."""

    def __init__(self, model: Any) -> None:
        self.inputs: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        self.outputs: list[Tensor] = []
        self._handles = [
            layer.self_attn.register_forward_hook(self._note, with_kwargs=True) for layer in model.model.layers
        ]

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.inputs.append((kwargs["hidden_states"], kwargs["position_embeddings"]))
        self.outputs.append(output[0][0])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def expected_errors(model: Any, prompt: list[int], tokens: list[int], heads: list[list[int]]) -> list[float]:
    """e(l) of eqs. 6-8: full attention against attention over 32 tokens of the prompt and the decoded ones."""
    captured = Captured(model)
    model(torch.tensor([prompt + tokens[:-1]]))
    captured.remove()
    num_prompt, errors = len(prompt), []
    for layer_idx, layer in enumerate(model.model.layers):
        (hidden, (cos, sin)), module = captured.inputs[layer_idx], layer.self_attn
        dim = module.head_dim
        query, key, value = (
            projection(hidden)[0].unflatten(-1, (-1, dim)).transpose(0, 1)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = (rotated(states, cos[0], sin[0]) for states in (query, key))
        group = query.shape[0] // key.shape[0]
        key, value = (states.repeat_interleave(group, dim=0) for states in (key, value))  # (H_q, T, D)
        kept = expected_kept(query[:, :num_prompt], key[:, :num_prompt], heads[layer_idx])
        total = 0.0
        for position in range(num_prompt, len(prompt) + len(tokens) - 1):
            seen = torch.arange(position + 1)
            cut = torch.cat([kept, torch.arange(num_prompt, position + 1)])
            outputs = []
            for where in (seen, cut):
                logits = torch.einsum("hd,htd->ht", query[:, position], key[:, where]) / math.sqrt(dim)
                mixed = torch.einsum("ht,htd->hd", logits.softmax(-1), value[:, where])
                outputs.append(module.o_proj(mixed.flatten()))
            torch.testing.assert_close(outputs[0], captured.outputs[layer_idx][position], atol=1e-4, rtol=1e-4)
            total += float((outputs[1] - outputs[0]).norm() / (outputs[0].norm() + 1e-6))
        errors.append(total)
    return errors


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def expected_kept(query: Tensor, key: Tensor, heads: list[int]) -> Tensor:
    """ALGORITHM, section 2, at 32 tokens."""
    num_tokens, window, pooled = key.shape[1], 8, []
    for head in heads:
        scores = torch.zeros(num_tokens)
        for position in range(num_tokens - window, num_tokens):
            logits = key[head, : position + 1] @ query[head, position] / math.sqrt(key.shape[-1])
            scores[: position + 1] += logits.softmax(-1)
        padded = torch.cat([torch.zeros(2), scores[: num_tokens - window], torch.zeros(2)])
        pooled.append(torch.stack([padded[i : i + 5].sum() / 5 for i in range(num_tokens - window)]))
    best = torch.stack(pooled).mean(0).argsort(descending=True, stable=True)[: 32 - window]
    return torch.cat([best.sort().values, torch.arange(num_tokens - window, num_tokens)])


def random_scores(num_layers: int, num_heads: int) -> Rows:
    scores = torch.rand(num_layers, num_heads, generator=torch.Generator().manual_seed(4)).tolist()
    return tuple(map(tuple, scores))


class TestLayerErrors:
    @pytest.fixture(params=["random", "planted"])
    def model(self, request: pytest.FixtureRequest, noisy: Planted) -> PreTrainedModel:
        return tiny.tiny_model("llama") if request.param == "random" else noisy[0]

    def test_are_those_of_an_independent_computation(
        self, model: PreTrainedModel, files: dict[str, Any], tmp_path: Path
    ) -> None:
        # Two lengths, so that a set is a sum over documents.
        few = CalibrationSettings(lengths=(256, 300), depths=(20, 70), max_new_tokens=12, error_documents=1, **files)
        measurement, tokenizer = new_measurement(model, few, tmp_path), planted.tokenizer()
        semantic = random_scores(model.config.num_hidden_layers, model.config.num_attention_heads)
        heads = [sorted(range(len(row)), key=lambda head: -row[head])[:4] for row in semantic]
        with routing(model):
            by_set = measurement.measure_errors(semantic)

        sums = {"needle": torch.zeros(len(heads)), "summary": torch.zeros(len(heads))}
        plan = list(measurement.documents())
        for document in (plan[0][1], plan[6][1]):  # the first of each length
            questions = [("needle", question) for question, _ in document.questions]
            for name, question in [*questions, ("summary", SUMMARY)]:
                text, _ = apply_chat_template(tokenizer, f"{document.text}\n\n{question}")
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                tokens = greedy(model, prompt, 12, tokenizer.eos_token_id)
                sums[name] += torch.tensor(expected_errors(model, prompt, tokens, heads))
        assert list(by_set) == ["needle", "summary"]
        for name, errors in by_set.items():
            expected = sums[name] / sums[name].sum()
            assert math.isclose(math.fsum(errors), 1, abs_tol=1e-9)
            torch.testing.assert_close(torch.tensor(errors), expected, atol=2e-4, rtol=1e-3)

    def test_combined_is_the_normalised_mean_of_the_sets(self, outcome: Outcome) -> None:
        sets = outcome.profile.layer_errors_by_set
        mean = torch.tensor([sets["needle"], sets["summary"]]).mean(0)
        torch.testing.assert_close(torch.tensor(outcome.profile.layer_errors), mean / mean.sum())

    def test_a_layer_that_loses_the_needle_has_the_larger_error(self, outcome: Outcome) -> None:
        """Layer 0 looks at the first token only, which its own heads keep."""
        errors = outcome.profile.layer_errors
        assert errors[0] < 1e-3
        assert min(errors[1:]) > 0.1

    def test_runs_on_error_documents_only(
        self, outcome: Outcome, settings: CalibrationSettings, tmp_path: Path
    ) -> None:
        measurement = new_measurement(planted.model(), dataclasses.replace(settings, error_documents=2), tmp_path)
        with routing(planted.model()):
            measurement.measure_errors(outcome.profile.semantic_scores)
        assert len(measurement.log) == 2


class TestStores:
    def test_every_packed_store_is_measured(self, outcome: Outcome) -> None:
        losses = outcome.profile.store_losses
        assert list(losses) == [name for name, one in PRECISIONS.items() if one.is_packed]
        assert 0 <= losses["int8"] <= losses["int4"] < math.inf

    def test_shares_of_documents_are_measured_on_documents_that_nothing_was_fitted_to(
        self, outcome: Outcome, settings: CalibrationSettings, tmp_path: Path
    ) -> None:
        losses = outcome.profile.document_losses
        assert list(losses) == ["0.0625", "0.125", "0.25", "0.5"]
        assert all(0 <= loss < math.inf for loss in losses.values())
        measurement = new_measurement(planted.model(), settings, tmp_path)
        with routing(planted.model()):
            again = measurement.measure_losses(Forecast().with_profile(outcome.profile))
            prompts = measurement.replay_prompts()
        assert again == (outcome.profile.store_losses, losses)
        assert len(measurement.log) == len(settings.lengths)
        read = [
            encode_questions(measurement.tokenizer, one, one.questions)[0] for one in measurement.losing_documents()
        ]
        assert not any(prompt in prompts for prompt in read)


# Memory ------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the shape of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[tuple[int, ...], str] = {}
        self.softmaxes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.shapes.setdefault(tuple(one.shape), str(func))
                if "softmax" in str(func) or "aten.exp_" in str(func):
                    self.softmaxes.add(tuple(one.shape))
        return made


class TestMemory:
    LENGTH = 1200

    @pytest.fixture
    def measurement(self, files: dict[str, Any], tmp_path: Path) -> Measurement:
        settings = CalibrationSettings(
            lengths=(self.LENGTH,), depths=(20, 70), max_new_tokens=12, num_rotations=1, **files
        )
        return new_measurement(planted.model(), settings, tmp_path)

    def test_no_matrix_of_tokens_by_tokens_is_made(self, measurement: Measurement, outcome: Outcome) -> None:
        semantic = outcome.profile.semantic_scores
        watched: dict[str, Watch] = {}
        steps: dict[str, Callable[[], object]] = {
            "heads": measurement.measure_heads,
            "errors": lambda: measurement.measure_errors(semantic),
        }
        for name, step in steps.items():
            with routing(planted.model()), Watch() as watched[name]:
                step()
        for watch in watched.values():
            assert any(max(shape, default=0) > self.LENGTH // 2 for shape in watch.shapes)  # it saw the document
            squares = {s: op for s, op in watch.shapes.items() if sum(size > self.LENGTH // 2 for size in s) > 1}
            assert not squares
        # One row a head for each token, and while heads choose the window's.
        assert {shape[-2] for shape in watched["heads"].softmaxes} == {1}
        assert {shape[-2] for shape in watched["errors"].softmaxes} == {8}

    def test_the_record_of_a_run_is_one_number_a_head_and_step(self) -> None:
        model = tiny.tiny_model("llama")
        config = decoder_config(model)
        with routing(model):
            cache = FullCache(model, lambda layer_idx, _: SpanLayer(layer_idx, config))
            prefill(model, tiny.random_tokens(60), cache)
            for layer in cache.routed:
                assert not hasattr(layer, "mass")  # nothing is recorded before a run starts
                layer.start(slice(3, 9))
            first = int(prefill(model, tiny.random_tokens(40, seed=1), cache).argmax())
            decode(model, no_end(), first, cache, 5)
        for layer in cache.routed:
            assert [tuple(one.shape) for one in layer.mass] == [(6,)] * 5
            assert all(one.untyped_storage().nbytes() == 6 * 4 for one in layer.mass)
            assert [tuple(one.shape) for one in layer.peaks] == [(6,)] * 5


# Going on after a kill ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended here."""


class TestGoingOn:
    @pytest.fixture
    def answered(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for each answer that was decoded, of all measurements."""
        answers: list[int] = []
        real = Measurement._answer

        def answer(self: Measurement, suffix: list[int], cache: FullCache) -> list[int]:
            answers.append(len(suffix))
            return real(self, suffix, cache)

        monkeypatch.setattr(Measurement, "_answer", answer)
        return answers

    def find(self, settings: CalibrationSettings, folder: Path, on_progress: Any = None) -> Outcome:
        return find_profile(planted.model(), planted.tokenizer(), "planted", folder, settings, on_progress)

    @pytest.mark.parametrize("num_runs", [1, 2, 5, 12])
    def test_finished_runs_are_not_measured_again(
        self, settings: CalibrationSettings, outcome: Outcome, tmp_path: Path, answered: list[int], num_runs: int
    ) -> None:
        def kill(_what: str, _done: float) -> None:
            if len(answered) >= num_runs:
                raise Killed

        with pytest.raises(Killed):
            self.find(settings, tmp_path, kill)
        again = self.find(settings, tmp_path)

        assert again.profile == outcome.profile
        assert again.runs == outcome.runs
        # the 12 runs; layer errors with both questions and the summary; stores with both questions
        assert len(answered) == 12 + 3 + 2
        (log,) = tmp_path.glob("*.jsonl")
        keys = [tuple(json.loads(line)["key"]) for line in log.read_text(encoding="utf-8").splitlines()]
        assert len(keys) == len(set(keys)) == 12 + 2

    def test_a_finished_calibration_measures_nothing(
        self, settings: CalibrationSettings, outcome: Outcome, tmp_path: Path, answered: list[int]
    ) -> None:
        self.find(settings, tmp_path)
        answered.clear()
        assert self.find(settings, tmp_path).profile == outcome.profile
        assert not answered

    def test_a_line_cut_short_costs_that_run_only(
        self, settings: CalibrationSettings, outcome: Outcome, tmp_path: Path, answered: list[int]
    ) -> None:
        self.find(settings, tmp_path)
        (log,) = tmp_path.glob("*.jsonl")
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:7]) + lines[7][:40])
        answered.clear()
        assert self.find(settings, tmp_path).profile == outcome.profile
        assert len(answered) == 5 + 3 + 2

    @pytest.mark.parametrize(
        "change",
        [{"lengths": (260,)}, {"depths": (20, 71)}, {"max_new_tokens": 13}, {"num_rotations": 5}],
        ids=lambda change: next(iter(change)),
    )
    def test_other_settings_are_another_log(
        self, settings: CalibrationSettings, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        one = new_measurement(planted.model(), settings, tmp_path)
        other = new_measurement(planted.model(), dataclasses.replace(settings, **change), tmp_path)
        assert one.log.path != other.log.path
        assert not list(tmp_path.iterdir())  # nothing was measured yet

    def test_a_second_process_waits_and_measures_nothing_again(
        self, settings: CalibrationSettings, tmp_path: Path
    ) -> None:
        model, told, outcomes = planted.model(), list[str](), list[Outcome]()
        first = find_profile(model, planted.tokenizer(), "tiny", tmp_path, settings)
        (log,) = tmp_path.glob("*.jsonl")
        whole = log.read_bytes()
        log.write_bytes(whole[: len(whole) // 2])  # as far as the first process has come
        waiting = threading.Event()

        def note(message: str, _: float) -> None:
            told.append(message)
            waiting.set()

        def second() -> None:
            outcomes.append(find_profile(model, planted.tokenizer(), "tiny", tmp_path, settings, note))

        with measuring_alone(tmp_path, str(first.profile.fingerprint), lambda *_: None):
            thread = threading.Thread(target=second)
            thread.start()
            assert waiting.wait(60)
            assert log.read_bytes() == whole[: len(whole) // 2]  # what is being written is left alone
            log.write_bytes(whole)
        thread.join(120)
        assert told[0] == "waiting for another process that profiles this model"
        assert outcomes[0].profile == first.profile
        assert log.read_bytes() == whole

    def test_other_text_needles_weights_template_or_dtype_are_another_log(
        self, settings: CalibrationSettings, files: dict[str, Any], noisy: Planted, tmp_path: Path
    ) -> None:
        haystack, needles, folder = tmp_path / "haystack.txt", tmp_path / "needles.json", tmp_path / "log"
        planted.write_haystack(haystack)
        planted.write_needles(needles)
        own = dataclasses.replace(settings, haystack=(str(haystack),), needles=str(needles))
        model, (other, tokenizer) = planted.model(), planted.build()

        logs = set[Path]()

        def logs_after(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
            logs.add(Measurement(model, tokenizer, folder, own, lambda *_: None).log.path)
            return len(logs)

        assert logs_after(model, planted.tokenizer()) == 1
        assert logs_after(other, tokenizer) == 1
        planted.write_haystack(haystack, num_sentences=399)
        assert logs_after(model, tokenizer) == 2
        planted.write_needles(needles, planted.TOPICS[1:])
        assert logs_after(model, tokenizer) == 3
        assert logs_after(noisy[0], tokenizer) == 4
        assert logs_after(other.to(torch.bfloat16), tokenizer) == 5
        tokenizer.chat_template = str(tokenizer.chat_template) + " "
        assert logs_after(model, tokenizer) == 6


# Refusals ----------------------------------------------------------------------------------------------------------


class TestRefusals:
    def refused(
        self,
        kind: type[CompressKVError],
        match: str,
        folder: Path,
        model: PreTrainedModel,
        settings: CalibrationSettings,
    ) -> CompressKVError:
        with pytest.raises(kind, match=match) as caught:
            find_profile(model, planted.tokenizer(), "tiny", folder, settings)
        assert "\n" not in str(caught.value)
        assert str(model.config._attn_implementation) in tiny.ATTENTIONS
        return caught.value

    def test_no_grouped_queries(self, settings: CalibrationSettings, tmp_path: Path) -> None:
        model = tiny.tiny_model("llama_mha")
        self.refused(ModelError, "6 KV heads for 6 query heads", tmp_path, model, settings)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("where", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
    def test_weights_that_are_not_numbers(self, settings: CalibrationSettings, tmp_path: Path, where: str) -> None:
        """Those that the fingerprint samples, and those that only a forward pass reaches."""
        model, _ = planted.build()
        model.get_parameter(where).data.fill_(float("nan"))
        self.refused(ModelError, "NaN", tmp_path, model, settings)

    def test_a_model_that_never_retrieves(self, settings: CalibrationSettings, tmp_path: Path) -> None:
        model, _ = planted.build()
        for layer, head in planted.COPYING:
            model.model.layers[layer].self_attn.o_proj.weight.data[:, head * 64 : head * 64 + 64] = 0
        error = self.refused(NothingRetrievedError, "no needle in 12 runs", tmp_path, model, settings)
        assert isinstance(error, NothingRetrievedError)
        assert isinstance(error, ProfileError)
        assert [run["answer"] for run in error.runs] == ["dunno"] * 12

    def test_lengths_above_the_context(self, files: dict[str, Any], tmp_path: Path) -> None:
        long = CalibrationSettings(lengths=(256, 2049), **files)
        self.refused(ConfigError, "2049.*2048", tmp_path, planted.model(), long)

    def test_a_haystack_shorter_than_the_longest_length_before_any_run(
        self, files: dict[str, Any], tmp_path: Path
    ) -> None:
        short = planted.write_haystack(tmp_path / "short.txt", 60)
        long = CalibrationSettings(lengths=(256, 1500), **{**files, "haystack": (str(short),)})
        self.refused(DataError, r"has \d+ tokens, fewer than the longest length 1500", tmp_path, planted.model(), long)
        assert not list(tmp_path.glob("*.jsonl"))

    def test_more_needles_than_a_length_has_room_for(self, files: dict[str, Any], tmp_path: Path) -> None:
        full = CalibrationSettings(lengths=(256,), max_new_tokens=200, **files)
        self.refused(ConfigError, "256 tokens leaves no room", tmp_path, planted.model(), full)


class TestSettings:
    @pytest.mark.parametrize("lengths", [(), (255,), (1024, 0), (-5,), (1024, 512, 1024)])
    def test_lengths_that_cannot_be(self, lengths: tuple[int, ...]) -> None:
        with pytest.raises(ConfigError, match="lengths="):
            CalibrationSettings(lengths=lengths)

    @pytest.mark.parametrize("depths", [(), (-1,), (50, 100.5), (float("nan"),), (10, float("nan")), (float("inf"),)])
    def test_depths_that_cannot_be(self, depths: tuple[float, ...]) -> None:
        with pytest.raises(ConfigError, match="depths="):
            CalibrationSettings(depths=depths)

    @pytest.mark.parametrize("name", ["max_new_tokens", "error_documents", "num_rotations"])
    def test_numbers_below_1(self, name: str) -> None:
        changes: dict[str, Any] = {name: 0}
        with pytest.raises(ConfigError, match=f"{name}=0"):
            CalibrationSettings(**changes)

    def test_quick_is_less_work_and_can_be_changed(self) -> None:
        quick, default = CalibrationSettings.quick(), CalibrationSettings()
        assert sum(quick.lengths) < sum(default.lengths)
        assert quick.num_rotations is not None
        changed = CalibrationSettings.quick(lengths=(512,), depths=(30, 70))
        assert (changed.lengths, changed.depths, changed.num_rotations) == ((512,), (30, 70), quick.num_rotations)

    @pytest.mark.parametrize(
        ("context_length", "lengths"),
        [
            (None, (1024, 2048, 4096)),
            (4096, (1024, 2048, 4096)),
            (2048, (1024, 2048)),
            (4095, (1024, 2048)),
            (512, (512,)),
        ],
    )
    def test_default_lengths_are_those_that_fit_the_model(
        self, context_length: int | None, lengths: tuple[int, ...]
    ) -> None:
        fitted = CalibrationSettings(depths=(5,)).fitted(context_length)
        assert fitted == CalibrationSettings(lengths=lengths, depths=(5,))

    def test_a_context_too_short_for_any_length_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="lengths="):
            CalibrationSettings().fitted(128)
