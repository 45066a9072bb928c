"""A whole evaluation: what a kill, a wrong option or a second start must not do to a run."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from msgspec.structs import asdict
from torch import Tensor

import planted
import tiny
from compresskv.attention import prefill as attention_prefill
from compresskv.attention import routing
from compresskv.errors import CompressKVError, ConfigError, DataError, PromptError
from compresskv.evaluation import press_records
from compresskv.evaluation.configurations import Configuration, configurations, parse_budgets
from compresskv.evaluation.evaluation import Counts, Evaluation
from compresskv.evaluation.press_request import PressRequest
from compresskv.evaluation.records import Record
from compresskv.evaluation.run_folder import read_run
from compresskv.evaluation.run_options import RunOptions, parse_rows
from compresskv.evaluation.tasks import registry
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.methods.compresskv import CompressKV
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.registry import parse_methods
from compresskv.methods.snapkv import SnapKV

FOLDER = "run"
METHODS, BUDGETS = "full,snapkv,streaming_llm", "30,60"


class Toy(Task):
    """Two subsets of planted needles: two short cases, and one of about 1,000 tokens."""

    name = "toy"
    summary = ""
    default_subsets = ("short", "long")
    metrics: ClassVar = {"score": "whether the needle is repeated"}

    def examples(self, settings: TaskSettings) -> list[Example]:
        if settings.data is not None and not settings.data.is_dir():
            raise DataError(": no such folder", option="data", value=str(settings.data))
        cases = [self._example("short", topic, 12) for topic in planted.TOPICS[: settings.limit or 2]]
        cases.append(self._example("long", "amber", 90))
        chosen = self.chosen_subsets(settings)
        return [case for case in cases if case.task.removeprefix("toy/") in chosen]

    def _example(self, subset: str, topic: str, num_sentences: int) -> Example:
        sentences = planted.haystack_sentences(num_sentences)
        sentences.insert(3, planted.needle(topic))
        answer = planted.needle(topic).removesuffix(".")
        return Example(f"toy/{subset}", topic, "", " ".join(sentences), f" What of {topic}?", (answer,), 10)

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return {"score": float(example.answers[0] in prediction)}


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry.tasks()  # registers the others
    monkeypatch.setitem(registry._TASKS, "toy", Toy)
    monkeypatch.chdir(tmp_path)


def toy(**options: Any) -> RunOptions:
    return RunOptions(**{"tasks": ("toy",), **options})


def opened(config: RunOptions | None = None, folder: str = FOLDER) -> Evaluation:
    return Evaluation(planted.model(), planted.tokenizer(), config or toy(), Path(folder))


def silent(_: str, __: float) -> None:
    pass


def run(
    config: RunOptions | None = None,
    methods: str = METHODS,
    budgets: str = BUDGETS,
    settings: Sequence[str] = ("aware",),
    folder: str = FOLDER,
) -> Counts:
    chosen = configurations(planted.model(), parse_methods("methods", methods), parse_budgets(budgets), settings)
    with opened(config, folder) as evaluation:
        evaluation.run(chosen, silent)
        return evaluation.counts


def records(folder: str = FOLDER) -> list[Record]:
    return read_run(Path(folder))[1]


def timeless(found: list[Record]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By key, without what the clock says; each key once."""
    by_key = {
        record.key: {name: value for name, value in asdict(record).items() if not name.endswith("_s")}
        for record in found
    }
    assert len(by_key) == len(found)
    return by_key


class TestRun:
    def test_every_case_and_configuration_has_one_record_from_one_prefill_a_case(self) -> None:
        counts = run()
        assert counts == Counts(examples=3, prefills=3, records=15)
        found = records()
        assert [record.key[:2] for record in found[::5]] == [
            ("toy/short", "amber"),
            ("toy/short", "birch"),
            ("toy/long", "amber"),
        ]
        assert [record.config for record in found[:5]] == [
            "full",
            "snapkv @ 30",
            "streaming_llm @ 30",
            "snapkv @ 60",
            "streaming_llm @ 60",
        ]
        assert all(record.metrics == {"score": 1.0} for record in found if record.method == "full")
        assert {record.metrics["score"] for record in found} == {0.0, 1.0}

    def test_the_same_again_reads_nothing_and_adds_nothing(self) -> None:
        run()
        before = (Path(FOLDER) / "records.jsonl").read_bytes()
        assert run() == Counts(examples=3)
        assert (Path(FOLDER) / "records.jsonl").read_bytes() == before

    def test_progress_goes_from_nothing_to_all(self) -> None:
        told: list[float] = []
        with opened() as evaluation:
            chosen = configurations(planted.model(), parse_methods("methods", METHODS), [30])
            evaluation.run(chosen, lambda _, fraction: told.append(fraction))
        assert told == sorted(told)
        assert (told[0], told[-1]) == (0, 1)

    def test_methods_and_budgets_added_later_are_all_that_is_run(self) -> None:
        run(budgets="30")
        before = records()
        assert run(methods="full,snapkv,knorm", budgets="30,60") == Counts(examples=3, prefills=3, records=9)
        assert records()[: len(before)] == before
        added = {record.config for record in records()[len(before) :]}
        assert added == {"knorm @ 30", "snapkv @ 60", "knorm @ 60"}
        run(folder="other", methods="full,snapkv,knorm,streaming_llm", budgets="30,60")
        at_once = timeless(records("other"))
        assert all(at_once[key] == row for key, row in timeless(records()).items())

    def test_settings_can_be_added_too(self) -> None:
        run(budgets="30")
        assert run(budgets="30", settings=("aware", "agnostic")) == Counts(examples=3, prefills=3, records=6)
        assert {record.setting for record in records()[-6:]} == {"agnostic"}

    def test_a_task_has_a_setting_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Toy, "setting", "agnostic")
        config = toy()
        assert config.own_settings == ("agnostic",)
        chosen = configurations(planted.model(), parse_methods("methods", METHODS), [30], ("aware", "agnostic"))
        with opened(config) as evaluation:
            evaluation.run(chosen, silent, own_settings=True)
        assert {record.config for record in records()} == {
            "full",
            "snapkv @ 30 (agnostic)",
            "streaming_llm @ 30 (agnostic)",
        }

    def test_questions_on_one_document_are_one_prefill(self) -> None:
        counts = run(RunOptions(tasks=("questions",), subsets=("facts",), lengths=(1200,)), "snapkv")
        assert (counts.examples, counts.prefills, counts.records) == (5, 1, 15)
        assert run(RunOptions(tasks=("questions",), subsets=("facts",), lengths=(1200,)), "snapkv").prefills == 0

    def test_shorter_answers_and_none(self) -> None:
        config = toy(max_new_tokens=3, answers=False)
        run(config)
        for record in records():
            if record.method == "full":
                assert record.token_ids is not None
                assert len(record.token_ids) == 3
            else:
                assert record.prediction is None

    @pytest.mark.parametrize(
        ("rows", "examples"),
        [
            ("", ["amber", "birch", "cedar", "amber"]),
            ("1", ["amber", "amber"]),
            ("1::2", ["birch"]),
            ("0::2", ["amber", "cedar", "amber"]),
            (" -1 : ", ["cedar", "amber"]),
        ],
    )
    def test_a_slice_is_taken_of_each_subset(self, rows: str, examples: list[str]) -> None:
        config = toy(limit=3, rows=parse_rows(rows))
        assert run(config, methods="full").records == len(examples)
        assert [record.example for record in records()] == examples

    def test_a_slice_that_leaves_nothing_is_refused(self) -> None:
        with pytest.raises(
            DataError, match="rows='5::' leaves no case: no subset has so many among the first 3, which"
        ):
            run(toy(limit=3, rows=parse_rows("5:")), methods="full")

    def test_a_subset_alone(self) -> None:
        assert run(toy(subsets=("long",))).examples == 1
        assert {record.task for record in records()} == {"toy/long"}


class TestKilled:
    @pytest.mark.parametrize("settings", [("aware",), ("aware", "agnostic")])
    @pytest.mark.parametrize("killed_at", [1, 5, 6, 13])
    def test_a_run_goes_on_without_loss_or_repetition(
        self, monkeypatch: pytest.MonkeyPatch, killed_at: int, settings: tuple[str, ...]
    ) -> None:
        """`killed_at`: calls of a method's score, three layers a cache."""
        run(settings=settings, folder="whole")
        whole = timeless(records("whole"))
        calls = iter(range(1, 10_000))
        score = SnapKV.score

        def mortal(self: SnapKV, inputs: LayerInputs) -> Tensor:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return score(self, inputs)

        monkeypatch.setattr(SnapKV, "score", mortal)
        with pytest.raises(KeyboardInterrupt):
            run(settings=settings)
        before = records()
        assert 0 < len(before) < len(whole)
        assert planted.model().config._attn_implementation == "sdpa"
        counts = run(settings=settings)
        assert counts.records == len(whole) - len(before)
        assert records()[: len(before)] == before
        found = timeless(records())
        assert list(found) == list(whole)
        for key, row in whole.items():
            # a prompt that is read in other pieces is rounded in other places
            assert found[key].pop("kl_divergence") == pytest.approx(row.pop("kl_divergence"), abs=1e-5)
            assert found[key] == row

    def test_half_a_record_is_made_again(self) -> None:
        run()
        whole = timeless(records())
        path = Path(FOLDER) / "records.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        assert run() == Counts(examples=3, prefills=1, records=1)
        assert timeless(records()) == whole

    def test_a_full_disk_loses_one_record_and_gives_the_model_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        add = "compresskv.evaluation.run_folder.RecordLog.add"

        def full(*_: object) -> None:
            raise DataError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(add, full)
            with suppress(DataError):
                run()
        assert planted.model().config._attn_implementation == "sdpa"
        assert run().records == 15


class TestAnotherPlan:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"limit": 1}, "limit=none, not 1"),
            ({"rows": (1, None, 2)}, "rows=::, not 1::2"),
            ({"seed": 3}, "seed=0, not 3"),
            ({"lengths": (64,)}, "lengths=1024,2048,4096, not 64"),
            ({"depths": (50.0,)}, "depths="),
            ({"subsets": ("long",)}, "subsets=none, not long"),
            ({"tasks": ("toy", "needle"), "subsets": ("long",)}, "tasks=toy, not toy,needle"),
            ({"too_long": "skip"}, 'too_long="cut", not "skip"'),
            ({"max_prompt_tokens": 500}, "max_prompt_tokens=none, not 500"),
            ({"max_new_tokens": 3}, "max_new_tokens=none, not 3"),
            ({"answers": False}, "answers=true, not false"),
            ({"data": Path()}, 'data=none, not ""'),
            ({"haystack": (Path("a.txt"),)}, "haystack=none, not a.txt"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_changed_option_is_named_in_one_line_and_nothing_is_added(
        self, changes: dict[str, Any], told: str
    ) -> None:
        run(methods="full")
        before = records()
        Path("a.txt").write_text("A haystack of its own.", encoding="utf-8")
        with pytest.raises(DataError, match=re.escape(told)):
            toy(**changes).check_folder(Path(FOLDER), planted.model().config._name_or_path)  # before a model is loaded
        with pytest.raises(DataError, match=re.escape(told)) as caught:
            run(toy(**changes))
        assert "\n" not in str(caught.value)
        assert "give another folder" in str(caught.value)
        assert records() == before
        assert run(methods="full").records == 0  # the folder was let go

    def test_another_profile_of_a_method_is_refused(self) -> None:
        model = planted.model()
        with opened() as evaluation:
            evaluation.run([Configuration("own", CompressKV(profile=tiny.random_profile(model)), 40)], silent)
        with opened() as evaluation, pytest.raises(DataError, match=r"own was run with profile .*, not None"):
            evaluation.run([Configuration("own", CompressKV(), 40)], silent)

    def test_a_prompt_that_changed_is_refused(self) -> None:
        run(methods="full")
        with opened() as evaluation:
            case = evaluation.cases[0]
            changed = replace(case, prompt=replace(case.prompt, input_ids=[*case.prompt.input_ids, 3]))
            evaluation.cases[0] = changed
            with pytest.raises(DataError, match=r"was another prompt .* another output folder"):
                evaluation.run(configurations(planted.model(), parse_methods("methods", "full,knorm"), [40]), silent)

    def test_another_model_is_refused(self) -> None:
        run(methods="full")
        toy().check_folder(Path(FOLDER), planted.model().config._name_or_path)
        with pytest.raises(DataError, match=r'model=".*", not "other"'):
            toy().check_folder(Path(FOLDER), "some/other")
        with pytest.raises(DataError, match="dtype="):
            Evaluation(tiny.build_model("llama").bfloat16(), planted.tokenizer(), toy(), Path(FOLDER))

    def test_where_the_data_lies_may_change_but_not_its_name(self, tmp_path: Path) -> None:
        for folder in ("one/data", "two/data"):
            (tmp_path / folder).mkdir(parents=True)
        run(toy(data=Path("one/data")), methods="full")
        assert run(toy(data=Path("two/data")), methods="full").records == 0

    def test_a_mistyped_option_does_not_claim_the_folder(self, tmp_path: Path) -> None:
        """Else the same command with the right option would be refused."""
        (tmp_path / "data").mkdir()
        with pytest.raises(DataError, match="no such folder"):
            run(toy(data=Path("daat")))
        assert not Path(FOLDER).exists()
        assert run(toy(data=Path("data")), methods="full").records == 3

    def test_a_run_is_one_processs_at_a_time(self) -> None:
        with opened(), pytest.raises(DataError, match="in use by another process"):
            opened()
        assert run(methods="full").records == 3


class TestPrefill:
    """Fast reading is for bfloat16 on some processors: it is noted, and a run keeps to it."""

    @pytest.fixture
    def num_fast(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Lengths of the prompts that were read fast."""
        lengths: list[int] = []
        own = routing.causal_attention

        def counted(query: Tensor, *args: Any) -> Tensor:
            lengths.append(query.shape[2])
            return own(query, *args)

        monkeypatch.setattr(attention_prefill, "_has_fast_bfloat16", lambda: True)
        monkeypatch.setattr(routing, "causal_attention", counted)
        return lengths

    @pytest.mark.parametrize(
        ("asked", "variable", "noted"),
        [(None, "0", "fast"), (True, "0", "exact"), (None, "1", "exact"), (False, "1", "fast")],
    )
    def test_records_note_how_prompts_were_read(
        self, num_fast: list[int], monkeypatch: pytest.MonkeyPatch, asked: bool | None, variable: str, noted: str
    ) -> None:
        monkeypatch.setenv("COMPRESSKV_EXACT_PREFILL", variable)
        model = tiny.tiny_model("llama", dtype=torch.bfloat16)
        config = toy(subsets=("long",), exact_prefill=asked)
        with Evaluation(model, planted.tokenizer(), config, Path(FOLDER)) as evaluation:
            evaluation.run(configurations(model, parse_methods("methods", "full,snapkv"), [30]), silent)
        assert {record.versions["prefill"] for record in records()} == {noted}
        assert bool(num_fast) == (noted == "fast")
        other = toy(subsets=("long",), exact_prefill=noted == "fast")
        told = "exact_prefill=true, not false" if noted == "exact" else "exact_prefill=false, not true"
        with pytest.raises(DataError, match=told):
            Evaluation(model, planted.tokenizer(), other, Path(FOLDER))
        if noted == "fast":  # the other way, only the loaded model tells
            with pytest.raises(DataError, match=told):
                other.check_folder(Path(FOLDER), model.config._name_or_path)

    def test_a_model_in_float32_is_always_read_exactly(self, num_fast: list[int]) -> None:
        run(toy(subsets=("long",)), methods="full")
        assert {record.versions["prefill"] for record in records()} == {"exact"}
        assert not num_fast


class TestTooLong:
    def test_cut_prompts_are_counted_and_their_records_say_so(self) -> None:
        counts = run(toy(max_prompt_tokens=300), methods="full,snapkv", budgets="30")
        assert counts == Counts(examples=3, truncated=1, prefills=3, records=6)
        for record in records():
            assert record.prompt_tokens <= 300
            assert (record.truncated_tokens > 0) == (record.task == "toy/long")
            assert record.metrics["score"] == 1 or record.method != "full"  # the needle is near the beginning

    def test_skipped_prompts_are_counted_and_have_no_records(self) -> None:
        counts = run(toy(max_prompt_tokens=300, too_long="skip"), methods="full")
        assert counts == Counts(examples=2, skipped=1, prefills=2, records=2)
        assert {record.task for record in records()} == {"toy/short"}

    def test_all_prompts_skipped_is_an_empty_run(self) -> None:
        config = toy(max_prompt_tokens=20, too_long="skip")
        assert run(config, methods="full") == Counts(skipped=3)

    def test_the_models_context_is_a_limit_that_leaves_room_for_the_answer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planted.model().config, "max_position_embeddings", 300)
        run(toy(subsets=("long",)), methods="full")
        (record,) = records()
        assert 280 <= record.prompt_tokens <= 290
        assert record.truncated_tokens > 0

    def test_a_limit_below_the_chat_template_ends_in_one_line(self) -> None:
        with pytest.raises(PromptError, match="no room for a prompt in 3 tokens"):
            run(toy(max_prompt_tokens=3))
        assert not Path(FOLDER).exists()


class TestPlan:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"tasks": ("needel",)}, "unknown task 'needel': did you mean 'needle'?"),
            ({"subsets": ("shrot",)}, "subsets='shrot' is unknown: did you mean 'short'?"),
            ({"subsets": ("short", "uuid")}, "subsets='uuid' is unknown: choose from short, long"),
            ({"too_long": "ship"}, "too_long='ship' is unknown: did you mean 'skip'?"),
            ({"max_prompt_tokens": 0}, "max_prompt_tokens=0 must be at least 1"),
            ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 1"),
        ],
    )
    def test_what_cannot_work_is_refused_before_a_model_is_loaded(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(told)) as caught:
            RunOptions(**{"tasks": ("toy",), **options})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["x", "1:x", "1.5:", "::0", "1:2:3:4", "1,2"])
    def test_what_is_no_slice_is_refused_in_one_line(self, text: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(f"rows={text!r}")) as caught:
            parse_rows(text)
        assert "\n" not in str(caught.value)

    def test_subsets_go_to_the_tasks_that_have_them(self) -> None:
        config = RunOptions(tasks=("toy", "needle", "babilong"), subsets=("uuid", "short"))
        assert [(one.name, subsets) for one, subsets in config.chosen_tasks()] == [
            ("toy", ("short",)),
            ("needle", ("uuid",)),
        ]


Row = dict[str, Any]


class Peers:
    """Stands for the peers' process: its rows, and what it was asked."""

    def __init__(self, failing: set[tuple[str, float]] = frozenset()) -> None:  # type: ignore[assignment]
        self.failing = failing
        self.asked: list[PressRequest] = []
        self.stops_after = 10_000

    def __call__(self, _: Path, request: PressRequest, __: str) -> Iterator[Row]:
        self.asked.append(request)
        yield from self._rows(request)

    def _rows(self, request: PressRequest) -> Iterator[Row]:
        pending = [(case, *config) for case in request.cases for config in request.pending(case)]
        for case, setting, press, budget in pending[: self.stops_after]:
            yield self._row(case, setting, press, budget)
        if len(pending) > self.stops_after:
            raise CompressKVError("the peers' process ended with status 1")

    def _row(self, case: Any, setting: str, press: str, budget: float) -> Row:
        row = {"task": case.task, "example": case.example, "method": f"kvpress:{press}"}
        row |= {"budget": budget, "setting": setting}
        if (case.example, budget) in self.failing:
            return row | {"error": "it would not"}
        figures = {"retained_tokens": 30.0, "logical_tokens": 30.0, "kv_nbytes": 10, "kv_nbytes_full": 100}
        told = {"top1_agreement": 0.5, "kl_divergence": None, "prefill_s": 0.1, "select_s": 0.1, "decode_s": 0.1}
        versions = {"torch": "theirs", "kvpress": "0.5.5"}
        return row | figures | told | {"token_ids": list(case.reference_ids), "versions": versions}


def request(settings: tuple[str, ...] = ("aware",), budgets: tuple[int | float, ...] = (30, 0.5)) -> PressRequest:
    return PressRequest("planted", (), ("SnapKVPress",), budgets, settings)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Peers:
    stand_in = Peers()
    monkeypatch.setattr(press_records, "run_peers", stand_in)
    return stand_in


def run_with_peers(asked: PressRequest) -> Counts:
    with opened() as evaluation:
        evaluation.run(configurations(planted.model(), parse_methods("methods", "full"), [30]), silent)
        evaluation.run_peers(Path("python"), asked, silent)
        return evaluation.counts


class TestPeers:
    def test_their_rows_become_records_like_ours(self, peers: Peers) -> None:
        counts = run_with_peers(request())
        assert counts == Counts(examples=3, prefills=3, records=3 + 6)
        full, theirs = records()[:3], records()[3:]
        assert [record.config for record in theirs] == ["kvpress:SnapKVPress @ 30", "kvpress:SnapKVPress @ 50%"] * 3
        for record, ours in zip(theirs[::2], full, strict=True):
            assert record.key[:2] == ours.key[:2]
            assert record.prediction == ours.prediction  # they repeated the full cache's tokens
            assert (record.metrics, record.prompt_sha256) == (ours.metrics, ours.prompt_sha256)
            assert (record.prompt_tokens, record.retained_tokens) == (ours.prompt_tokens, 30)
            assert (record.shared_prefill, ours.shared_prefill) == (False, True)
            assert record.versions == {**ours.versions, "torch": "theirs", "kvpress": "0.5.5"}
            assert (record.top1_agreement, record.kl_divergence, record.evidence_recall) == (0.5, None, None)

    def test_they_read_our_prompts_and_are_compared_with_our_full_cache(self, peers: Peers) -> None:
        run_with_peers(request())
        full = {record.key[:2]: record for record in records()[:3]}
        for case in peers.asked[0].cases:
            record = full[case.task, case.example]
            assert len(case.input_ids) == record.prompt_tokens
            assert list(case.reference_ids) == record.token_ids
            assert case.max_new_tokens == 10
            assert case.suffix_start is not None
            question = planted.tokenizer().decode(case.input_ids[case.suffix_start :])
            assert question.split()[:3] == ["What", "of", case.example]

    def test_failures_are_told_by_name_and_only_they_are_tried_again(self, peers: Peers) -> None:
        peers.failing = {("birch", 0.5)}
        counts = run_with_peers(request())
        assert counts.peer_failures == ["toy/short birch, kvpress:SnapKVPress @ 50%: it would not"]
        assert counts.records == 3 + 5
        before = records()
        peers.failing = set()
        assert run_with_peers(request()) == Counts(examples=3, records=1)
        (case,) = peers.asked[1].cases
        assert (case.example, case.done) == ("birch", ("kvpress:SnapKVPress @ 30",))
        assert records()[:-1] == before
        assert records()[-1].key == ("toy/short", "birch", "kvpress:SnapKVPress @ 50%")

    def test_they_run_in_a_tasks_own_setting_too(self, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Toy, "setting", "agnostic")
        with opened() as evaluation:
            evaluation.run_peers(Path("python"), request(("aware", "agnostic"), (30,)), silent, own_settings=True)
        assert {record.config for record in records()} == {"kvpress:SnapKVPress @ 30 (agnostic)"}

    def test_progress_counts_what_is_run(self, peers: Peers) -> None:
        peers.stops_after = 1
        with pytest.raises(CompressKVError, match="status 1"):
            run_with_peers(request())
        peers.stops_after, peers.failing = 10_000, {("birch", 30)}
        told: list[float] = []
        with opened() as evaluation:
            evaluation.run_peers(Path("python"), request(), lambda _, fraction: told.append(fraction))
        assert told == [number / 5 for number in range(1, 6)]

    def test_predictions_are_scored_with_their_indentation(self, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planted.tokenizer(), "decode", lambda *_, **__: "  return 1\n")
        scored: list[str] = []
        monkeypatch.setattr(Toy, "score", lambda _, __, text: scored.append(text) or {"score": 1.0})
        run_with_peers(request())
        assert {record.prediction for record in records()} == set(scored) == {"  return 1\n"}

    def test_a_run_that_has_all_of_them_starts_no_process(self, peers: Peers) -> None:
        run_with_peers(request())
        assert run_with_peers(request()) == Counts(examples=3)
        assert len(peers.asked) == 1

    def test_what_they_did_before_they_died_is_kept(self, peers: Peers) -> None:
        peers.stops_after = 3
        with pytest.raises(CompressKVError, match="status 1"):
            run_with_peers(request())
        assert len(records()) == 3 + 3
        peers.stops_after = 10_000
        assert run_with_peers(request()).records == 3
        assert len(timeless(records())) == 9

    def test_budgets_and_settings_can_be_added(self, peers: Peers) -> None:
        run_with_peers(request(budgets=(30,)))
        assert run_with_peers(request(("aware", "agnostic"), (30, 0.5))).records == 3 * 4 - 3
        assert len(timeless(records())) == 3 + 3 * 4
