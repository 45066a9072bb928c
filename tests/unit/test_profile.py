"""The profile's file format: what is written is read, and every damage is told in one line."""

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from compresskv.errors import ProfileError
from compresskv.methods.compresskv import CompressKV
from compresskv.methods.vote import Vote
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.layer_errors import combined, l1_normalised
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.store import write_profile
from compresskv.profiles.stores import best_store, loss_of_share, sparing_store, warn_of_lossy_store

SHAPE = Fingerprint("llama", 6, 3, 1, 8, 32, "0123456789abcdef")
PROFILE = Profile(
    model_id="org/model",
    fingerprint=SHAPE,
    layer_indices=(0, 2, 5),
    semantic_scores=((0.5, 0.0, 1.25), (0.0, 0.0, 0.0), (0.1, 3.0, 3.0)),
    traditional_scores=((0.0, 0.0, 0.0), (1.0, 2.0, 3.0), (0.0, 0.0, 0.0)),
    num_runs=12,
    layer_errors_by_set={"essays": (0.5, 0.25, 0.25), "code": (0.1, 0.2, 0.7)},
    layer_errors=(0.3, 0.225, 0.475),
    loss_curves={"blend": (20.0, 2.5)},
    store_losses={"int8": 0.001, "int4": 0.25},
    document_losses={"0.125": 0.5, "0.5": 0.125},
    provenance={"torch": "2.13.0", "seed": 7, "lengths": [1024, 2048], "text": "naïve\nlines"},
)
IMPORTED = replace(PROFILE, fingerprint=structs.replace(SHAPE, weights=None), traditional_scores=None, num_runs=0)


@pytest.mark.parametrize("profile", [PROFILE, IMPORTED])
def test_round_trip(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    assert read_profile(str(tmp_path / "profile.json")) == profile


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_round_trip_of_any_numbers(data: st.DataObject) -> None:
    """Every float comes back to the last bit."""
    num_layers, num_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    scores = st.lists(st.floats(0, 1e6), min_size=num_heads, max_size=num_heads).map(tuple)
    rows = st.lists(scores, min_size=num_layers, max_size=num_layers).map(tuple)
    errors = st.lists(st.floats(1e-6, 1e6), min_size=num_layers, max_size=num_layers).map(l1_normalised)
    by_set = data.draw(st.dictionaries(st.text(max_size=5), errors, min_size=1, max_size=3))
    profile = Profile(
        model_id=data.draw(st.text(max_size=10)),
        fingerprint=structs.replace(SHAPE, num_layers=num_layers, num_query_heads=num_heads),
        layer_indices=tuple(range(num_layers)),
        semantic_scores=data.draw(rows.filter(lambda rows: any(map(any, rows)))),
        traditional_scores=data.draw(st.none() | rows.filter(lambda rows: any(map(any, rows)))),
        num_runs=data.draw(st.integers(0, 10**6)),
        layer_errors_by_set=by_set,
        layer_errors=combined(by_set),
    )
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


DROP = "(dropped)"
ADDED = ("replay_weights", "loss_curves", "store_losses", "document_losses")
KEYS = [
    *((key,) for key in PROFILE.to_dict() if key not in ADDED),  # older files have none
    ("model", "id"),
    ("model", "fingerprint"),
    *(("model", "fingerprint", key) for key in SHAPE.__struct_fields__ if key != "weights"),
    ("layer_errors", "sets"),
    ("layer_errors", "combined"),
]
NUMBERS = [
    ("semantic_scores", 0, 0),
    ("traditional_scores", 1, 2),
    ("layer_errors", "sets", "code", 1),
    ("layer_errors", "combined", 0),
]
DAMAGE: list[tuple[tuple[str | int, ...], Any]] = [
    *((key, DROP) for key in KEYS),
    *((number, value) for number in NUMBERS for value in (math.nan, math.inf, -1.0, None, "many", [], {}, 10**400)),
    *((("format",), value) for value in ("other", None)),
    *((("version",), value) for value in (0, 2, "1", None)),
    (("model",), "llama"),
    (("model", "fingerprint"), []),
    (("model", "fingerprint", "num_heads"), 3),
    (("model", "fingerprint", "num_layers"), "6"),
    (("model", "fingerprint", "num_layers"), 5),
    (("model", "fingerprint", "num_query_heads"), 4),
    *((("layer_indices",), value) for value in ([], 3, [0, 2], [0, 2, 5, 5], [0, 5, 2], [0, 2, 2], [0, 2, 6])),
    *((("layer_indices",), value) for value in ([-1, 2, 5], [0.5, 2, 5], ["0", 2, 5], [0, 2, math.inf])),
    *((("num_runs",), value) for value in (-1, 1.5, math.inf, math.nan, "many", None)),
    (("semantic_scores", 1), DROP),
    (("semantic_scores", 1, 0), DROP),
    (("traditional_scores", 1), DROP),
    (("traditional_scores", 1, 0), DROP),
    *((("semantic_scores",), value) for value in (None, [], [[0, 0, 0]] * 3)),
    (("layer_errors",), [0.5, 0.25, 0.25]),
    (("layer_errors", "sets"), [[0.5, 0.25, 0.25]]),
    *((("layer_errors", "sets", "code"), value) for value in ([0.5, 0.5], [0.5, 0.25, 0.5], [0, 0, 0])),
    *((("layer_errors", "combined"), value) for value in ([1.0], [0.3, 0.225, 0.4], [30, 22.5, 47.5])),
    *((("provenance",), value) for value in ([1], "calibrated", None)),
    *(
        (("loss_curves",), value)
        for value in (None, [], {"blend": [1.0]}, {"blend": [1.0, "2"]}, {"blend": [1.0, 0.0]})
    ),
    *((("loss_curves", "blend"), value) for value in ([math.nan, 1.0], [math.inf, 1.0], [-1.0, 1.0])),
    *((("store_losses",), value) for value in (None, [], {"int8": "0"}, {"int8": -0.1}, {"int8": math.inf})),
    *((("document_losses",), value) for value in (None, {"0.5": -0.1}, {"half": 0.1}, {"1.5": 0.1}, {"nan": 0.1})),
    *((("replay_weights",), value) for value in ("AAAA", ["AAAAAA=="] * 2, ["AAAAAA=="] * 2 + ["?"], [0.5] * 3)),
]


@pytest.mark.parametrize(("place", "value"), DAMAGE, ids=lambda part: str(part)[:40])
def test_damage_is_told_in_one_line_that_names_the_file(
    place: tuple[str | int, ...], value: Any, tmp_path: Path
) -> None:
    data = copy.deepcopy(PROFILE.to_dict())
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    if value is DROP:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data), encoding="utf-8")  # writes NaN and Infinity as such
    _assert_refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"compresskv-profile"',
        b"{}",
        b"\x00\x01\x02",
        b"\xff\xfe\x00",
        b"\x89PNG\r\n\x1a\n\x00\xff",
        b"[" * 100_000,
        json.dumps(PROFILE.to_dict()).encode()[:-20],
        json.dumps(PROFILE.to_dict()).encode("utf-16"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_profile(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    _assert_refused(path)


def test_a_profile_without_curves_is_what_it_was_before_there_were_any() -> None:
    bare = replace(PROFILE, loss_curves={}, store_losses={}, document_losses={})
    assert not {"loss_curves", "store_losses", "document_losses"} & set(bare.to_dict())
    assert Profile.from_dict(bare.to_dict()) == bare
    assert bare.digest != PROFILE.digest


def test_what_stores_lose_changes_no_choice() -> None:
    """So sessions and runs of a profile without it go on with one that has it."""
    assert replace(PROFILE, store_losses={}, document_losses={}).digest == PROFILE.digest


@pytest.mark.parametrize(
    ("share", "loss"),
    [
        (0.0, math.inf),
        (0.03125, 0.5 * 5 / 3),
        (0.125, 0.5),
        (0.25, 0.3125),
        (0.5, 0.125),
        (0.5**0.5, 0.0625),
        (1.0, 0.0),
    ],
)
def test_what_a_share_of_a_document_loses_lies_between_what_was_measured(share: float, loss: float) -> None:
    assert loss_of_share(PROFILE.document_losses, share) == pytest.approx(loss)


@given(st.dictionaries(st.sampled_from(["0.0625", "0.125", "0.25", "0.5"]), st.floats(1e-3, 9), min_size=1))
def test_fewer_tokens_than_were_ever_measured_lose_more(losses: dict[str, float]) -> None:
    lowest = min(map(float, losses))
    found = [loss_of_share(losses, lowest * factor) for factor in (1, 0.5, 0.1, 0.01, 0)]
    assert found == sorted(set(found))


BY_STORE = {"int8": 0.001, "int4": 0.01, "int2": 0.05, "of another release": 0.0}


@pytest.mark.parametrize(
    ("held", "store"),
    [
        ({"native": 1.0, "int8": 1.0, "int4": 1.0, "int2": 1.0}, "native"),
        ({"native": 0.5, "int8": 1.0, "int4": 1.0, "int2": 1.0}, "int8"),
        ({"native": 0.25, "int8": 0.5, "int4": 1.0, "int2": 1.0}, "int4"),
        ({"native": 0.1, "int8": 0.2, "int4": 0.4, "int2": 0.8}, "int2"),
        ({"native": 0.0, "int8": 0.0, "int4": 0.0, "int2": 0.001}, "int2"),
    ],
)
def test_the_best_store_is_that_whose_losses_add_up_to_least(held: dict[str, float], store: str) -> None:
    assert best_store(replace(PROFILE, store_losses=BY_STORE), held.__getitem__) == store


@pytest.mark.parametrize("without", ["store_losses", "document_losses"])
def test_where_a_profile_does_not_tell_both_the_smallest_store_that_is_borne_is_best(without: str) -> None:
    profile = replace(PROFILE, **{"store_losses": {"int8": 0.001, "int4": 0.002}, without: {}})
    assert best_store(profile, lambda _: 0.5) == sparing_store(profile) == ("int4" if profile.store_losses else "int8")
    assert best_store(None, lambda _: 0.5) == "int8"


def test_a_store_that_the_model_bears_badly_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"org/model bears the store 'int4' badly: .* 0.25 .*; 'int8' loses 0.001"):
        warn_of_lossy_store(PROFILE, "int4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for profile, store in ((PROFILE, "int8"), (PROFILE, "native"), (None, "int4"), (IMPORTED, "int4k8")):
            warn_of_lossy_store(profile, store)
    with pytest.warns(UserWarning, match="'native' loses 0.000"):
        warn_of_lossy_store(replace(PROFILE, store_losses={"int4": 0.25}), "int4")


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file"):
        read_profile(tmp_path / "none.json")
    _assert_refused(tmp_path / "none.json")
    _assert_refused(tmp_path)
    (tmp_path / "file").write_text("text", encoding="utf-8")
    _assert_refused(tmp_path / "file" / "profile.json")
    _assert_refused(tmp_path / ("x" * 300))


def _assert_refused(path: Path) -> None:
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    message = str(caught.value)
    assert message.startswith(f"profile={str(path)!r} ")
    assert "\n" not in message


def test_texts_of_types_of_their_own_are_stored_as_texts() -> None:
    """torch.__version__ is one."""
    profile = replace(PROFILE, provenance={"torch": torch.__version__})
    assert profile.to_dict()["provenance"] == {"torch": str(torch.__version__)}
    assert Profile.from_dict(profile.to_dict()).digest == profile.digest


def test_the_field_is_named() -> None:
    with pytest.raises(ProfileError, match=r"^field 'semantic_scores' has 2 layers instead of 3$"):
        replace(PROFILE, semantic_scores=PROFILE.semantic_scores[:2])
    with pytest.raises(ProfileError, match=r"^field 'layer_errors.code' sums to 0.8000 instead of 1$"):
        replace(PROFILE, layer_errors_by_set={"code": (0.1, 0.2, 0.5)})
    with pytest.raises(ProfileError, match=r"^field 'version' is 9, this release reads 1$"):
        Profile.from_dict({**PROFILE.to_dict(), "version": 9})


class TestHeads:
    def test_top_heads_are_those_of_the_models_layer(self) -> None:
        assert PROFILE.top_heads(0, 2) == [2, 0]
        assert PROFILE.top_heads(5, 1) == [1]  # of equal scores the first
        assert PROFILE.top_heads(5, 3) == [1, 2, 0]
        assert PROFILE.top_heads(5, 99) == [1, 2, 0]

    @pytest.mark.parametrize("layer_idx", [1, 6, -1])
    def test_a_layer_that_is_not_there(self, layer_idx: int) -> None:
        with pytest.raises(ProfileError, match=f"profile of org/model has no layer {layer_idx}"):
            PROFILE.top_heads(layer_idx, 2)

    def test_ranked_heads_name_the_models_layers(self) -> None:
        best = PROFILE.ranked_heads(PROFILE.semantic_scores)
        assert best[:4] == [(5, 1), (5, 2), (0, 2), (0, 0)]
        assert sorted(best) == [(layer, head) for layer in (0, 2, 5) for head in range(3)]
        assert PROFILE.traditional_scores is not None
        assert PROFILE.ranked_heads(PROFILE.traditional_scores)[:3] == [(2, 2), (2, 1), (2, 0)]

    def test_a_kv_head_is_weighed_by_its_own_best_reader_against_the_whole_models_best(self) -> None:
        """Query heads that read one KV head adjoin: pairs of (0, 2) and (1, 3) would give other weights."""
        scores = ((0.5, 0.0, 1.0, 0.25), (0.0, 0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 0.125))
        shape = structs.replace(SHAPE, num_query_heads=4, num_kv_heads=2)
        profile = replace(PROFILE, fingerprint=shape, semantic_scores=scores, traditional_scores=None)
        assert [profile.kv_head_weights(layer) for layer in (0, 2, 5)] == [[0.25, 0.5], [0.0, 0.0], [1.0, 0.0625]]
        each = replace(profile, fingerprint=structs.replace(shape, num_kv_heads=4))
        assert each.kv_head_weights(0) == [0.25, 0.0, 0.5, 0.125]
        assert PROFILE.kv_head_weights(0) == [pytest.approx(1.25 / 3)]

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 4), st.integers(1, 4), st.data())
    def test_weights_lie_between_0_and_1_and_reach_1(self, num_kv_heads: int, groups: int, data: st.DataObject) -> None:
        heads = num_kv_heads * groups
        row = st.lists(st.floats(0, 1e6), min_size=heads, max_size=heads).map(tuple)
        scores = data.draw(st.tuples(row, row, row).filter(lambda rows: any(map(any, rows))))
        shape = structs.replace(SHAPE, num_query_heads=heads, num_kv_heads=num_kv_heads)
        profile = replace(PROFILE, fingerprint=shape, semantic_scores=scores, traditional_scores=None)
        best = max(map(max, scores))
        for layer, own in zip((0, 2, 5), scores, strict=True):
            expected = [max(own[i] for i in range(heads) if i // groups == kv) / best for kv in range(num_kv_heads)]
            assert profile.kv_head_weights(layer) == expected
        assert max(max(profile.kv_head_weights(layer)) for layer in (0, 2, 5)) == 1

    @pytest.mark.parametrize("layer_idx", [1, 6, -1])
    def test_no_weights_are_made_up_for_a_layer_that_is_not_there(self, layer_idx: int) -> None:
        with pytest.raises(ProfileError, match=f"profile of org/model has no layer {layer_idx}"):
            PROFILE.kv_head_weights(layer_idx)


class TestMethodsThatNeedOne:
    def test_without_one_they_say_which_command_makes_it(self) -> None:
        for method in (CompressKV(), Vote()):
            with pytest.raises(ProfileError, match=rf"^method '{method.name}' needs a profile .*'compresskv profile "):
                _ = method.measured

    def test_ranks_are_refused_only_where_layers_are_compared(self) -> None:
        with pytest.raises(
            ProfileError, match=r"^method 'vote' compares .*org/model holds ranks .*'compresskv profile"
        ):
            Vote().with_profile(IMPORTED)
        assert CompressKV().with_profile(IMPORTED).measured is IMPORTED
        assert Vote().with_profile(PROFILE).measured is PROFILE


class TestErrors:
    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30))
    def test_normalised_sums_to_one_in_proportion(self, errors: list[float]) -> None:
        shares = l1_normalised(errors)
        assert math.fsum(shares) == pytest.approx(1)
        if sum(errors) > 0:
            assert shares == pytest.approx([error / sum(errors) for error in errors])
        else:
            assert shares == (1 / len(errors),) * len(errors)

    def test_sets_count_alike(self) -> None:
        assert combined({"a": (1.0, 0.0), "b": (0.5, 0.5)}) == pytest.approx((0.75, 0.25))
        assert combined({"a": (3.0, 1.0)}) == pytest.approx((0.75, 0.25))
