"""The figures: what they show, and what is told where they cannot be drawn."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compresskv.calibration import plots
from compresskv.calibration.verify import Ablation
from compresskv.errors import ConfigError
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.layer_errors import l1_normalised
from compresskv.profiles.profile import Profile
from compresskv.selection.sharing import error_aware

ABLATIONS = [
    Ablation("none", 0, 8, 8),
    *(Ablation("semantic", count, 8 - count, 8) for count in (2, 4)),
    *(Ablation("traditional", count, 7, 8) for count in (2, 4)),
    *(Ablation("random", count, 24, 24) for count in (2, 4)),
]


def make_profile(num_layers: int, num_heads: int) -> Profile:
    """Full-attention layers are every second of the model's."""
    scores = tuple(tuple(float((layer + 1) * head % 7) for head in range(num_heads)) for layer in range(num_layers))
    errors = l1_normalised([1.0 + layer % 5 for layer in range(num_layers)])
    return Profile(
        model_id="/home/user/models/some-model",
        fingerprint=Fingerprint("llama", 2 * num_layers, num_heads, 1, 8, 32, "0123"),
        layer_indices=tuple(range(0, 2 * num_layers, 2)),
        semantic_scores=scores,
        traditional_scores=scores,
        num_runs=3,
        layer_errors_by_set={"a": errors},
        layer_errors=errors,
    )


PROFILE = make_profile(10, 6)


class TestDrawn:
    @pytest.fixture
    def figures(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What is drawn, as matplotlib's objects, beside the files."""
        pytest.importorskip("matplotlib", reason="the 'plot' extra is not installed")
        seen: list[Any] = []
        real = plots._save

        def save(figure: Any, path: Path) -> None:
            seen.append(figure)
            real(figure, path)

        monkeypatch.setattr(plots, "_save", save)
        return seen

    @pytest.mark.parametrize(("num_layers", "num_heads"), [(1, 2), (30, 9), (32, 32)])
    def test_png_files_of_a_size_to_look_at(
        self, figures: list[Any], tmp_path: Path, num_layers: int, num_heads: int
    ) -> None:
        profile = make_profile(num_layers, num_heads)
        plots.head_scores(profile, tmp_path / "new" / "heads.png")
        plots.layer_budgets(profile, 256, tmp_path / "new" / "layers.png")
        plots.ablation(ABLATIONS, tmp_path / "new" / "verify.png")
        for path in (tmp_path / "new").iterdir():
            header = path.read_bytes()[:24]
            assert header[:8] == b"\x89PNG\r\n\x1a\n"
            assert all(300 < int.from_bytes(header[at : at + 4], "big") < 4000 for at in (16, 20))

    def test_semantic_scores_stand_beside_traditional_ones(self, figures: list[Any], tmp_path: Path) -> None:
        profile = replace(PROFILE, traditional_scores=tuple(row[::-1] for row in PROFILE.semantic_scores))
        plots.head_scores(profile, tmp_path / "heads.png")
        maps = [axes for axes in figures[0].axes if axes.images]
        assert [axes.get_title() for axes in maps] == ["Semantic retrieval score", "Traditional retrieval score"]
        assert [axes.images[0].get_array().tolist() for axes in maps] == [
            [list(row) for row in profile.semantic_scores],
            [list(row) for row in profile.traditional_scores or ()],
        ]
        assert figures[0].get_suptitle() == "some-model"

    def test_layers_are_called_by_their_number_in_the_model(self, figures: list[Any], tmp_path: Path) -> None:
        plots.head_scores(PROFILE, tmp_path / "heads.png")
        plots.layer_budgets(PROFILE, 64, tmp_path / "layers.png")
        expected = [str(index) for index in PROFILE.layer_indices]
        assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == expected
        assert [label.get_text() for label in figures[1].axes[0].get_xticklabels()] == expected

    def test_imported_ranks_are_called_ranks_and_stand_alone(self, figures: list[Any], tmp_path: Path) -> None:
        plots.head_scores(replace(PROFILE, num_runs=0, traditional_scores=None), tmp_path / "heads.png")
        (only,) = [axes for axes in figures[0].axes if axes.images]
        assert "Rank" in only.get_title()

    def test_bars_are_the_budgets_and_the_line_their_mean(self, figures: list[Any], tmp_path: Path) -> None:
        plots.layer_budgets(PROFILE, 100, tmp_path / "layers.png")
        axes = figures[0].axes[0]
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == error_aware(100, 1 << 30, PROFILE.layer_errors)
        assert sum(heights) == 100 * 10
        assert set(axes.lines[0].get_ydata()) == {100}

    def test_lines_start_at_the_whole_model(self, figures: list[Any], tmp_path: Path) -> None:
        plots.ablation(ABLATIONS, tmp_path / "verify.png")
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figures[0].axes[0].get_lines()}
        assert lines == {
            "semantic heads": [(0, 100), (2, 75), (4, 50)],
            "traditional heads": [(0, 100), (2, 87.5), (4, 87.5)],
            "random heads": [(0, 100), (2, 100), (4, 100)],
        }

    def test_without_traditional_heads_there_is_no_line(self, figures: list[Any], tmp_path: Path) -> None:
        few = [one for one in ABLATIONS if one.group != "traditional"]
        plots.ablation(few, tmp_path / "verify.png")
        assert [line.get_label() for line in figures[0].axes[0].get_lines()] == ["semantic heads", "random heads"]

    @pytest.mark.parametrize("name", ["file/heads.png", "heads.nonsense"])
    def test_a_place_that_cannot_be_written_is_told_in_one_line(
        self, figures: list[Any], tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot write the figure") as caught:
            plots.head_scores(PROFILE, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"compresskv\[plot\]"):
        plots.layer_budgets(PROFILE, 64, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())
