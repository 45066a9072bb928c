"""Profiles out of the published files, and which models they are used for."""

import functools
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from compresskv.calibration import plots
from compresskv.compression import compressing
from compresskv.errors import CompressKVError, ModelError, ProfileError
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import load
from compresskv.profiles import authors, store
from compresskv.profiles.authors import published_files
from compresskv.profiles.layer_errors import combined, l1_normalised
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.published import import_published
from compresskv.profiles.store import default_path, resolve_profile, user_folder, write_profile
from compresskv.selection.sharing import error_aware

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "published_profiles"
PUBLISHED_MODELS = ["Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3", "Qwen2.5-7B-Instruct"]

HEADS = {"0": [3, 1, 0, 2], "1": [2, 0, 1, 3], "2": [0, 1, 2, 3]}
ERRORS = {"one": [2.0, 1.0, 1.0], "two": [0.1, 0.2, 0.7], "avg_score": [0.3, 0.225, 0.475]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 layers and 4 query heads, as the rankings above have them."""
    return planted.save(tmp_path_factory.mktemp("models") / "planted")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty user's cache, and nothing shipped."""
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "none")


RUNS = {f"{layer}-{head}": [0.125 * (layer + 1), 0.25 * head, 0.0, 0.0] for layer in range(3) for head in range(4)}
"""Raw scores of each run, as the authors have them."""


def write_scores(folder: Path, content: Any = RUNS) -> Path:
    path = folder / "scores.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_pair(folder: Path, heads: Any = HEADS, errors: Any = ERRORS) -> tuple[Path, Path]:
    paths = (folder / "heads.json", folder / "layers.jsonl")
    for path, content in zip(paths, (heads, errors), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4), encoding="utf-8")
    return paths


def assert_is_what_the_files_say(profile: Profile, heads: dict[str, list[int]], errors: dict[str, list[float]]) -> None:
    for layer, ranked in heads.items():
        for count in (1, 4, len(ranked)):
            assert profile.top_heads(int(layer), count) == ranked[:count]
    average = errors["avg_score"]
    for mine, theirs in zip(profile.layer_errors, average, strict=True):
        assert math.isclose(mine, theirs / math.fsum(average), rel_tol=1e-9)
    assert set(profile.layer_errors_by_set) == set(errors) - {"avg_score"}
    for name, row in profile.layer_errors_by_set.items():
        assert row == pytest.approx(l1_normalised(errors[name]))
    for budget in (1, 8, 31, 32, 33, 64, 128, 256, 1024, 2048):
        tokens = error_aware(budget, 100_000, profile.layer_errors)
        assert sum(tokens) == budget * len(average)
        assert max(tokens) <= 3 * budget
    assert profile.num_runs == 0
    assert profile.fingerprint.weights is None


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here: ../shared/data is absent")
@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_the_published_files(name: str, tmp_path: Path) -> None:
    """Their shapes are known: nothing is fetched."""
    heads, layers = PUBLISHED / f"{name}_head_idx.json", PUBLISHED / f"{name}_layer_score.jsonl"
    with published_files(name, PUBLISHED) as (_, _, scores):
        profile = import_published(heads, layers, f"some-org/{name}", scores)
    assert_is_what_the_files_say(profile, json.loads(heads.read_text()), json.loads(layers.read_text()))
    shape = profile.fingerprint
    assert (profile.model_id, len(profile.layer_indices)) == (f"some-org/{name}", shape.num_layers)
    write_profile(profile, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    if scores is None:
        assert profile.comparable_scores is None
    else:
        means = json.loads(scores.read_text())["mean"]
        layer, head = max(means, key=lambda place: means[place]).split("-")
        assert profile.best_heads[0] == (int(layer), int(head))
        assert profile.comparable_scores_of(int(layer))[int(head)] == means[f"{layer}-{head}"]


def test_a_pair_for_a_models_folder(model_folder: Path, tmp_path: Path) -> None:
    profile = import_published(*write_pair(tmp_path), str(model_folder))
    assert_is_what_the_files_say(profile, HEADS, ERRORS)
    assert profile.provenance["imported_from"] == ["heads.json", "layers.jsonl"]


def test_without_an_average_it_is_computed(model_folder: Path, tmp_path: Path) -> None:
    sets = {name: row for name, row in ERRORS.items() if name != "avg_score"}
    profile = import_published(*write_pair(tmp_path, errors=sets), str(model_folder))
    assert profile.layer_errors == combined({name: l1_normalised(row) for name, row in sets.items()})
    assert profile.layer_errors == pytest.approx([0.3, 0.225, 0.475])


def test_an_average_alone_is_enough(model_folder: Path, tmp_path: Path) -> None:
    profile = import_published(*write_pair(tmp_path, errors={"avg_score": [4, 0, 4]}), str(model_folder))
    assert (profile.layer_errors, profile.layer_errors_by_set) == ((0.5, 0.0, 0.5), {})


class TestHeadScores:
    @pytest.mark.parametrize("as_means", [False, True])
    def test_they_compare_heads_of_all_layers(self, model_folder: Path, tmp_path: Path, as_means: bool) -> None:
        means = {place: sum(scores) / 4 for place, scores in RUNS.items()}
        content = {"kind": "traditional", "runs": 4, "mean": means} if as_means else RUNS
        pair, scores = write_pair(tmp_path), write_scores(tmp_path, content)
        profile = import_published(*pair, str(model_folder), scores)
        assert_is_what_the_files_say(profile, HEADS, ERRORS)  # the order within a layer is that of the semantic ranks
        assert profile.best_heads[:5] == [(2, 3), (1, 3), (0, 3), (2, 2), (1, 2)]
        assert profile.comparable_scores_of(1) == pytest.approx([0.0625, 0.125, 0.1875, 0.25])
        assert profile.kv_head_weights(1) == pytest.approx([0.125 / 0.28125, 0.25 / 0.28125])
        assert profile.provenance["imported_from"] == ["heads.json", "layers.jsonl", "scores.json"]
        assert profile.provenance["traditional_runs"] == 4
        write_profile(profile, tmp_path / "profile.json")
        assert read_profile(tmp_path / "profile.json") == profile

    @pytest.mark.parametrize("name", ["blend", "vote"])
    def test_methods_that_compare_layers_run_by_them(self, model_folder: Path, tmp_path: Path, name: str) -> None:
        model, _ = load(str(model_folder), device="cpu")
        bare = import_published(*write_pair(tmp_path), str(model_folder))
        with pytest.raises(ProfileError, match="import head scores, too"):
            compressing(model, name, 40, profile=bare)
        scored = import_published(*write_pair(tmp_path), str(model_folder), write_scores(tmp_path))
        with compressing(model, name, 40, profile=scored) as cache:
            model(torch.arange(100)[None] % 50, past_key_values=cache)
        kept = [layer.mean_retained for layer in cache.compressed_layers]
        assert sum(kept) == pytest.approx(120)

    @pytest.mark.parametrize(
        "content",
        [
            "no JSON",
            "[]",
            '{"0-0": 1}',
            '{"mean": [1]}',
            json.dumps({"kind": "semantic", "runs": 1, "mean": dict.fromkeys(RUNS, 1.0)}),
            json.dumps({"kind": "traditional", "runs": "many", "mean": dict.fromkeys(RUNS, 1.0)}),
            *(
                json.dumps({**RUNS, "1-2": bad})
                for bad in (None, [], ["much"], [-1.0], [math.nan], [math.inf], [10**400])
            ),
            json.dumps({place: scores for place, scores in RUNS.items() if place != "1-2"}),
            json.dumps({**RUNS, "3-0": [1.0]}),
            json.dumps({place: [0.0, 0.0] for place in RUNS}),
        ],
    )
    def test_malformed_scores(self, model_folder: Path, tmp_path: Path, content: str) -> None:
        pair, scores = write_pair(tmp_path), write_scores(tmp_path, content)
        with pytest.raises(ProfileError) as caught:
            import_published(*pair, str(model_folder), scores)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"head_scores={str(scores)!r}")


class TestByName:
    """Files from a server on this machine, which has them where the authors do."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        folder = tmp_path / "served"
        with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            monkeypatch.setattr(authors, "_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
            yield folder
            server.shutdown()
            thread.join()

    def write(self, folder: Path, name: str) -> None:
        shape = authors.find_published(name).shape
        layers, heads = range(shape.num_layers), range(shape.num_query_heads)
        (folder / "scores").mkdir(parents=True)
        scores = folder / "Retrieval_Head_Identification" / "head_score" / f"{name}.json"
        scores.parent.mkdir(parents=True)
        ranked = {str(layer): list(reversed(heads)) for layer in layers}
        (folder / "scores" / f"{name}_head_idx.json").write_text(json.dumps(ranked))
        (folder / "scores" / f"{name}_layer_score.jsonl").write_text(json.dumps({"avg_score": [1.0] * len(layers)}))
        scores.write_text(json.dumps({f"{layer}-{head}": [layer, head] for layer in layers for head in heads}))

    @pytest.mark.parametrize("name", PUBLISHED_MODELS)
    def test_all_that_was_published_is_fetched(self, served: Path, name: str) -> None:
        published = authors.find_published(name)
        self.write(served / published.commit, name)
        with published_files(published.hub_id) as (heads, layers, scores):
            profile = import_published(heads, layers, published.hub_id, scores)
        assert profile.top_heads(3, 1) == [published.shape.num_query_heads - 1]
        assert (profile.comparable_scores is not None) == published.has_head_scores
        assert not heads.exists()

    def test_a_file_that_is_not_there_is_told_in_one_line(self, served: Path) -> None:
        name = PUBLISHED_MODELS[0]
        self.write(served / authors.find_published(name).commit, name)
        next(served.glob("*/scores/*_layer_score.jsonl")).unlink()
        message = self.refused(name)
        assert message.startswith(f"published={name!r}: http://127.0.0.1:")
        assert "_layer_score.jsonl cannot be fetched (File not found)" in message

    def test_without_a_network_the_folder_is_told_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(authors, "_ADDRESS", "http://127.0.0.1:9")
        assert self.refused(PUBLISHED_MODELS[1]).endswith("have its files in a folder and give folder=FOLDER")

    def test_an_unknown_name(self) -> None:
        assert self.refused("Llama-2") == f"published='Llama-2' is none of {', '.join(PUBLISHED_MODELS)}"

    def refused(self, name: str) -> str:
        with pytest.raises(ProfileError) as caught, published_files(name):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)


class TestUse:
    def test_it_is_used_for_the_model_of_that_name(self, model_folder: Path, tmp_path: Path) -> None:
        profile = import_published(*write_pair(tmp_path), str(model_folder))
        write_profile(profile, user_folder() / "imported.json")
        model, _ = load(str(model_folder), device="cpu")
        assert resolve_profile(model) == profile

    def test_a_measured_profile_of_these_weights_comes_first(self, model_folder: Path, tmp_path: Path) -> None:
        """Whatever the files are called: an imported one knows the model by name and shape alone."""
        model, _ = load(str(model_folder), device="cpu")
        imported = import_published(*write_pair(tmp_path), str(model_folder))
        measured = replace(imported, fingerprint=fingerprint(model), num_runs=5)
        write_profile(imported, user_folder() / "imported.json")
        write_profile(measured, default_path(fingerprint(model)))
        assert resolve_profile(model) == measured

    def test_it_is_not_used_for_a_model_of_another_name(self, model_folder: Path, tmp_path: Path) -> None:
        """Two fine-tuned models have one shape and different heads."""
        profile = import_published(*write_pair(tmp_path), str(model_folder))
        write_profile(profile, user_folder() / "imported.json")
        model, _ = load(str(model_folder), device="cpu")
        model.config._name_or_path = "org/other"
        with pytest.raises(ProfileError, match="no profile of this model"):
            resolve_profile(model)
        # Whoever names the file takes the responsibility.
        assert resolve_profile(model, user_folder() / "imported.json") == profile

    def test_it_is_not_used_for_a_model_of_another_shape(self, model_folder: Path, tmp_path: Path) -> None:
        profile = import_published(*write_pair(tmp_path), str(model_folder))
        write_profile(profile, user_folder() / "imported.json")
        model, _ = load(str(model_folder), device="cpu")
        model.config.num_key_value_heads = 4
        with pytest.raises(ProfileError, match="no profile of this model"):
            resolve_profile(model)
        with pytest.raises(ProfileError, match="belongs to another model"):
            resolve_profile(model, user_folder() / "imported.json")


BAD_HEADS = [
    "",
    "no JSON",
    "[[0, 1]]",
    "{}",
    '{"1": [0, 1, 2, 3]}',
    '{"0": 5}',
    '{"0": null}',
    '{"0": ["a", "b"]}',
    '{"0": []}',
    '{"0": [0, 1, 2, 2]}',
    '{"0": [0, 1, 2, 4]}',
    '{"0": [0, 1, 2, 3], "1": [0, 1, 2]}',
    '{"0": [0, 1, 2, 3], "2": [0, 1, 2, 3]}',
    '{"0": [0, 1, 2, 3], "1": [0, 1, 2, 3], "2": [0, 1, 2, 3], "3": [0, 1, 2, 3]}',
    '{"0": [0, 1], "1": [0, 1], "2": [0, 1]}',
]
BAD_LAYERS = [
    "",
    "no JSON",
    "[0.5, 0.25, 0.25]",
    "{}",
    '{"one": 3}',
    '{"one": "abc"}',
    '{"one": [0.5, "much", 0.25]}',
    '{"one": [0.5, null, 0.25]}',
    '{"one": [0.5, 0.5]}',
    '{"one": [0.5, 0.25, 0.25], "avg_score": [1]}',
    '{"one": [0.5, NaN, 0.25]}',
    '{"one": [0.5, -0.5, 1]}',
    '{"one": [Infinity, 0.5, 1]}',
    f'{{"one": [1{"0" * 400}, 0.5, 1]}}',
]


class TestDamage:
    def refused(self, heads: Path, layers: Path, model: str, named: Path, kind: type[Exception] = ProfileError) -> None:
        with pytest.raises(kind) as caught:
            import_published(heads, layers, model)
        assert isinstance(caught.value, CompressKVError)
        assert "\n" not in str(caught.value)
        assert str(named) in str(caught.value)

    @pytest.mark.parametrize("content", BAD_HEADS)
    def test_malformed_heads(self, model_folder: Path, tmp_path: Path, content: str) -> None:
        heads, layers = write_pair(tmp_path, heads=content)
        num_layers = max(1, content.count('": ['))  # as many as the heads, so that nothing is wrong with the errors
        layers.write_text(json.dumps({"avg_score": [1] * num_layers}), encoding="utf-8")
        self.refused(heads, layers, str(model_folder), heads)

    @pytest.mark.parametrize("content", BAD_LAYERS)
    def test_malformed_layers(self, model_folder: Path, tmp_path: Path, content: str) -> None:
        heads, layers = write_pair(tmp_path, errors=content)
        self.refused(heads, layers, str(model_folder), layers)

    @pytest.mark.parametrize("content", [b"\xff\xfe{", b"\0" * 20])
    @pytest.mark.parametrize("which", [0, 1])
    def test_binary_files(self, model_folder: Path, tmp_path: Path, content: bytes, which: int) -> None:
        pair = write_pair(tmp_path)
        pair[which].write_bytes(content)
        self.refused(*pair, str(model_folder), pair[which])

    @pytest.mark.parametrize("which", [0, 1])
    def test_missing_files_and_folders(self, model_folder: Path, tmp_path: Path, which: int) -> None:
        pair = write_pair(tmp_path)
        pair[which].unlink()
        self.refused(*pair, str(model_folder), pair[which])
        pair[which].mkdir()
        self.refused(*pair, str(model_folder), pair[which])

    def test_a_model_without_a_config(self, tmp_path: Path) -> None:
        (tmp_path / "nothing").mkdir()
        self.refused(*write_pair(tmp_path), str(tmp_path / "nothing"), tmp_path / "nothing", ModelError)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here: ../shared/data is absent")
def test_a_published_ranking_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = PUBLISHED_MODELS[0]
    heads, layers = PUBLISHED / f"{name}_head_idx.json", PUBLISHED / f"{name}_layer_score.jsonl"
    plots.head_scores(import_published(heads, layers, name), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000
