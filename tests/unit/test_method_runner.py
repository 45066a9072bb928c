"""One prefill serves every configuration, and none of them can tell."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from msgspec import structs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compresskv
import planted
import tiny
from compresskv.evaluation.configurations import Configuration, configurations
from compresskv.evaluation.encode import EncodedPrompt
from compresskv.evaluation.method_runner import Case, Runner
from compresskv.evaluation.records import SETTINGS, Record
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.registry import parse_methods
from compresskv.methods.snapkv import SnapKV
from compresskv.models.decoding import prefill
from compresskv.system import clock

NUM_PROMPT, NUM_CONTEXT, NUM_NEW = 90, 72, 8
BUDGETS = (20, 0.4)
EVIDENCE = (slice(10, 20), slice(50, 60))
METHODS = [name for name in tiny.EVICTING_METHODS if name != "vote"]


class Length(Task):
    """Scores an answer by its length, so that a mixed-up answer shows."""

    name = "length"
    summary = ""
    default_subsets = ("one",)
    metrics: ClassVar = {"score": "share of 100 characters"}

    def examples(self, settings: TaskSettings) -> list[Example]:
        return []

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return {"score": min(1.0, len(prediction) / 100)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Names the tiny models' tokens; none of them ends an answer."""
    made = planted.bytes_tokenizer()
    made.eos_token = None
    return made


def case(question_seed: int = 0, num_new: int = NUM_NEW, suffix_start: int = NUM_CONTEXT) -> Case:
    context = tiny.random_tokens(suffix_start, seed=7)[0].tolist()
    question = tiny.random_tokens(NUM_PROMPT - suffix_start, seed=question_seed)[0].tolist()
    example = Example("length/one", "7", "", "", "", ("x",), num_new, meta={"length": 90, "depth": 12.5})
    return Case(Length(), example, EncodedPrompt([*context, *question], 3, EVIDENCE, suffix_start))


def all_of(
    model: PreTrainedModel, settings: Sequence[str] = SETTINGS[:1], budgets: Sequence[int | float] = BUDGETS
) -> list[Configuration]:
    methods = parse_methods("methods", ",".join(METHODS))
    return configurations(model, methods, budgets, settings, tiny.random_profile(model))


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward pass reads."""
    seen: list[int] = []

    def note(_: Any, __: Any, options: dict[str, Any]) -> None:
        seen.append(options["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def timeless(record: Record) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(record).items() if not name.endswith("_s")}


def by_config(records: Iterator[Record]) -> dict[str, Record]:
    return {record.config: record for record in records}


class TestAware:
    @pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
    @pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
    def test_every_record_is_what_compressing_and_greedy_decoding_give_alone(
        self, family: str, attn_implementation: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, one = tiny.tiny_model(family, attn_implementation), case()
        chosen, prompt = all_of(model), torch.tensor([one.prompt.input_ids])
        records = list(Runner(model, tokenizer).run(one, chosen))
        assert [record.config for record in records] == [configuration.name for configuration in chosen]
        for record, configuration in zip(records[1:], chosen[1:], strict=True):
            budget = configuration.budget
            assert budget is not None
            with compresskv.compressing(model, configuration.method, budget) as cache:
                prefill(model, prompt, cache)
                kept, nbytes = tiny.kept_counts(cache).double().mean(), cache.nbytes
                wanted = {token for span in EVIDENCE for token in range(span.start, span.stop)}
                found = [
                    len(wanted & set(head)) / len(wanted)
                    for layer in cache.compressed_layers
                    for head in tiny.kept_tokens(layer)[0]
                ]
            with compresskv.compressing(model, configuration.method, budget) as cache:
                alone = tiny.generate(model, prompt, cache, max_new_tokens=NUM_NEW)[0].tolist()
            assert record.token_ids == alone, record.config
            assert record.prediction == tokenizer.decode(alone, skip_special_tokens=True).strip()
            assert record.metrics == Length().score(one.example, record.prediction)
            assert record.retained_tokens == pytest.approx(float(kept))
            assert record.kv_nbytes == nbytes < record.kv_nbytes_full == records[0].kv_nbytes
            assert record.evidence_recall == pytest.approx(sum(found) / len(found))

    def test_every_store_gives_what_it_gives_alone(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model, one = tiny.tiny_model("llama"), case()
        methods, stores = parse_methods("methods", "full,snapkv,adakv"), ("native", "int8", "int4")
        chosen = configurations(model, methods, ("20kB",), stores=stores)
        records = {record.config: record for record in Runner(model, tokenizer).run(one, chosen)}
        joined = {record.config: record for record in Runner(model, tokenizer, answers=False).run(one, chosen)}
        for configuration in chosen[1:]:
            record, store = records[configuration.name], configuration.store
            with compresskv.compressing(model, configuration.method, configuration.budget or 1, store=store) as cache:
                alone = tiny.generate(model, torch.tensor([one.prompt.input_ids]), cache, max_new_tokens=NUM_NEW)
            assert (record.token_ids, record.store) == (alone[0].tolist(), store)
            assert record.kv_nbytes == cache.retained_nbytes
            assert record.kl_divergence == pytest.approx(joined[configuration.name].kl_divergence, abs=1e-4)
        retained = [records[f"snapkv{store} @ 20kB"].retained_tokens for store in ("", " int8", " int4")]
        assert retained == sorted(retained)
        assert retained[0] < 0.5 * retained[2]
        assert 0 < (records["full int8 @ 100%"].kl_divergence or 0) < (records["full int4 @ 100%"].kl_divergence or 0)

    @pytest.mark.parametrize("num_ahead", [1, 4, NUM_NEW - 1])
    @pytest.mark.parametrize("method", ["snapkv", "blend"])
    def test_looking_ahead_gives_the_answer_of_compressing(
        self, method: str, num_ahead: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, one = tiny.tiny_model("llama"), case()
        methods = parse_methods("methods", f"{method}[lookahead={num_ahead}]")
        chosen = configurations(model, methods, BUDGETS[:1], profile=tiny.random_profile(model))
        full, record = Runner(model, tokenizer).run(one, chosen)
        with compresskv.compressing(model, chosen[1].method, BUDGETS[0]) as cache:
            alone = tiny.generate(model, torch.tensor([one.prompt.input_ids]), cache, max_new_tokens=NUM_NEW)
        assert record.token_ids == alone[0].tolist()
        assert (record.token_ids or [])[: num_ahead + 1] == (full.token_ids or [])[: num_ahead + 1]
        assert record.kv_nbytes * NUM_PROMPT == full.kv_nbytes * (BUDGETS[0] + num_ahead)
        assert record.kl_divergence is not None
        assert (record.kl_divergence == 0) == (num_ahead == NUM_NEW - 1)

    def test_an_answer_shorter_than_the_look_ahead_is_the_full_caches(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        chosen = configurations(model, parse_methods("methods", f"snapkv[lookahead={NUM_NEW}]"), BUDGETS[:1])
        full, record = Runner(model, tokenizer).run(case(), chosen)
        assert record.token_ids == full.token_ids
        assert record.kv_nbytes == record.kv_nbytes_full
        assert (record.kl_divergence, record.top1_agreement) == (0, 1)

    def test_methods_differ_or_nothing_here_is_proved(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        records = list(Runner(model, tokenizer).run(case(), all_of(model)))
        assert len({tuple(record.token_ids or ()) for record in records}) > 3

    def test_the_prompt_is_read_once_for_all_configurations(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        chosen = all_of(model)
        with passes(model) as seen:
            assert len(list(Runner(model, tokenizer).run(case(), chosen))) == len(chosen)
        assert [tokens for tokens in seen if tokens >= NUM_NEW] == [NUM_PROMPT]

    def test_which_others_run_beside_it_does_not_show_in_a_record(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A window larger than its own is captured for the others, and the order is theirs."""
        model = tiny.tiny_model("llama")
        chosen = all_of(model)
        together = by_config(Runner(model, tokenizer).run(case(), chosen[::-1]))
        for configuration in chosen:
            (alone,) = Runner(model, tokenizer).run(case(), [configuration])
            assert alone.kl_divergence == pytest.approx(together[configuration.name].kl_divergence, abs=1e-5)
            both = (alone, together[configuration.name])
            one, other = (timeless(structs.replace(record, kl_divergence=None)) for record in both)
            assert one == other

    def test_a_record_tells_of_its_case_and_its_run(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model, one = tiny.tiny_model("llama"), case()
        runner = Runner(model, tokenizer, seed=5, versions={"torch": "x"})
        for record in runner.run(one, all_of(model, SETTINGS)):
            assert (record.task, record.example) == ("length/one", "7")
            assert (record.prompt_tokens, record.truncated_tokens) == (NUM_PROMPT, 3)
            assert record.prompt_sha256 == one.prompt.sha256
            assert (record.meta, record.seed, record.versions["torch"]) == (one.example.meta, 5, "x")
            assert record.shared_prefill
            for seconds in (record.prefill_s, record.select_s):
                assert seconds is not None
                assert seconds >= 0
            assert (record.decode_s is None) == (record.method != "full"), "rows of a batch have no time of their own"

    def test_seconds_are_those_of_a_device_that_is_waited_for(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in for a GPU: each forward pass owes a second, which passes when the device is waited for."""
        model, seconds, owed = tiny.tiny_model("llama"), [0.0], [0.0]

        def wait(_: torch.device) -> None:
            seconds[0] += owed[0]
            owed[0] = 0.0

        def owe(*_: Any) -> None:
            owed[0] += 1.0

        monkeypatch.setattr(clock, "synchronize", wait)
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
        hook = model.register_forward_pre_hook(owe)
        try:
            records = list(Runner(model, tokenizer).run(case(), all_of(model)))
        finally:
            hook.remove()
        for record in records:
            # one pass over the prompt and, where answers are not decoded side by side, for each token but the first
            expected = (1.0, 0.0, NUM_NEW - 1.0 if record.method == "full" else None)
            assert (record.prefill_s, record.select_s, record.decode_s) == expected, record.config

    def test_answers_of_one_token_have_no_divergence(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        full, *others = Runner(model, tokenizer).run(case(num_new=1), all_of(model))
        for record in others:
            assert record.token_ids == full.token_ids
            assert (record.kl_divergence, record.top1_agreement) == (None, None)

    def test_caches_that_are_large_together_go_into_several_batches(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, chosen = tiny.tiny_model("llama"), all_of(tiny.tiny_model("llama"), budgets=(0.4,))
        at_once = [record.token_ids for record in Runner(model, tokenizer).run(case(), chosen)]
        monkeypatch.setattr("compresskv.evaluation.method_runner._LITTLE", 0)
        with passes(model) as seen:
            bounded = [record.token_ids for record in Runner(model, tokenizer).run(case(), chosen)]
        assert bounded == at_once
        assert seen.count(NUM_NEW - 1) > 1 + len(METHODS) // 3, "two of two fifths are no larger than the prompt's own"

    def test_without_answers_only_the_full_cache_decodes(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        chosen = all_of(model, SETTINGS)
        answered = by_config(Runner(model, tokenizer).run(case(), chosen))
        with passes(model) as seen:
            measured = by_config(Runner(model, tokenizer, answers=False).run(case(), chosen))
        assert seen.count(1) == NUM_NEW - 1
        assert seen.count(NUM_NEW - 1) == 3, "the full cache and each setting"
        for name, record in measured.items():
            other = answered[name]
            assert record.kl_divergence == pytest.approx(other.kl_divergence, abs=1e-5)
            without = {"prediction": None, "metrics": {}, "token_ids": None} if name != "full" else {}
            without["kl_divergence"] = record.kl_divergence
            assert timeless(record) == timeless(structs.replace(other, **without))

    def test_the_model_gets_its_attention_back_when_a_method_fails(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The fixture that watches shared models would tell."""

        @dataclass(frozen=True)
        class Broken(SnapKV):
            def score(self, inputs: LayerInputs) -> Tensor:
                raise ZeroDivisionError

        model = tiny.tiny_model("llama")
        with pytest.raises(ZeroDivisionError):
            list(Runner(model, tokenizer).run(case(), [Configuration("broken", Broken(), 20)]))
        assert model.config._attn_implementation == "sdpa"


class TestFull:
    @pytest.mark.parametrize("settings", [SETTINGS[:1], SETTINGS])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_it_is_the_plain_model(
        self, family: str, settings: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, one = tiny.tiny_model(family), case()
        record = next(Runner(model, tokenizer).run(one, all_of(model, settings)))
        plain = tiny.generate(model, torch.tensor([one.prompt.input_ids]), max_new_tokens=NUM_NEW)[0].tolist()
        assert (record.method, record.budget, record.setting) == ("full", None, "aware")
        assert record.token_ids == plain
        assert record.prediction == tokenizer.decode(plain, skip_special_tokens=True).strip()
        assert record.retained_tokens == record.prompt_tokens == NUM_PROMPT
        assert record.kv_nbytes == record.kv_nbytes_full
        if family == "llama":
            assert record.kv_nbytes == 4 * 2 * 2 * 8 * 4 * NUM_PROMPT  # layers, keys and values, KV heads, size, bytes
        assert (record.kl_divergence, record.top1_agreement, record.evidence_recall) == (0, 1, 1)

    def test_without_known_evidence_there_is_no_recall(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        one = case()
        unknown = replace(one, prompt=replace(one.prompt, evidence=()))
        recalls = {record.evidence_recall for record in Runner(model, tokenizer).run(unknown, all_of(model, SETTINGS))}
        assert recalls == {None}


_seen: list[LayerInputs] = []


@dataclass(frozen=True)
class Watched(SnapKV):
    """Notes what it is shown."""

    def score(self, inputs: LayerInputs) -> Tensor:
        _seen.append(inputs)
        return super().score(inputs)


class TestAgnostic:
    def shown(self, question_seed: int, setting: str, tokenizer: PreTrainedTokenizerBase) -> list[LayerInputs]:
        _seen.clear()
        configuration = Configuration("watched", Watched(), 20, setting)
        list(Runner(tiny.tiny_model("llama"), tokenizer).run(case(question_seed), [configuration]))
        return list(_seen)

    def test_a_method_sees_nothing_of_the_question(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pairs = zip(*(self.shown(seed, "agnostic", tokenizer) for seed in (1, 2)), strict=True)
        for one, other in pairs:
            assert one.keys.shape[2] == NUM_CONTEXT
            for name in ("keys", "values", "query_window"):
                assert torch.equal(getattr(one, name), getattr(other, name))
            assert torch.equal(Watched().score(one), Watched().score(other))
        aware = zip(*(self.shown(seed, "aware", tokenizer) for seed in (1, 2)), strict=True)
        assert any(not torch.equal(one.query_window, other.query_window) for one, other in aware)

    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_every_record_is_what_comes_of_compressing_the_document_and_then_reading_the_question(
        self, family: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, one = tiny.tiny_model(family), case()
        chosen = [configuration for configuration in all_of(model, SETTINGS) if configuration.setting == "agnostic"]
        prompt = torch.tensor([one.prompt.input_ids])
        for record, configuration in zip(Runner(model, tokenizer).run(one, chosen), chosen, strict=True):
            budget = configuration.budget
            assert budget is not None
            with compresskv.compressing(model, configuration.method, budget) as cache:
                prefill(model, prompt[:, :NUM_CONTEXT], cache)
                kept, nbytes = tiny.kept_counts(cache).double().mean(), cache.nbytes
                full_nbytes = cache.full_nbytes
                answer = [int(prefill(model, prompt[:, NUM_CONTEXT:], cache).argmax())]
                while len(answer) < NUM_NEW:
                    answer.append(int(prefill(model, torch.tensor([answer[-1:]]), cache).argmax()))
            assert record.config == f"{configuration.label} @ {'40%' if budget == 0.4 else budget} (agnostic)"
            assert record.token_ids == answer, record.config
            assert record.retained_tokens == pytest.approx(float(kept) + NUM_PROMPT - NUM_CONTEXT)
            assert (record.kv_nbytes, record.kv_nbytes_full) == (nbytes, full_nbytes)

    def test_both_settings_beside_each_other_read_the_document_once(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        chosen = all_of(model, SETTINGS)
        with passes(model) as seen:
            together = by_config(Runner(model, tokenizer).run(case(), chosen))
        num_question = NUM_PROMPT - NUM_CONTEXT
        assert [tokens for tokens in seen if tokens >= NUM_NEW] == [NUM_CONTEXT, num_question, num_question]
        aware = by_config(Runner(model, tokenizer).run(case(), all_of(model)))
        for name, record in aware.items():
            assert together[name].token_ids == record.token_ids
            assert together[name].evidence_recall == record.evidence_recall
            assert together[name].kl_divergence == pytest.approx(record.kl_divergence, abs=1e-4)

    def test_a_document_is_read_a_second_time_once_for_all_budgets(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        chosen = configurations(model, parse_methods("methods", "kvzip,kvzip[guaranteed=1]"), [9, 30], ("agnostic",))
        with passes(model) as seen:
            _, *records = Runner(model, tokenizer).run(case(), chosen)
        assert seen.count(NUM_CONTEXT) == 2
        retained = [record.retained_tokens - (NUM_PROMPT - NUM_CONTEXT) for record in records]
        assert retained == pytest.approx([9, 9, 30, 30])

    @pytest.mark.parametrize("settings", [SETTINGS[:1], SETTINGS])
    def test_questions_on_one_document_share_its_reading_and_cutting_and_see_nothing_of_one_another(
        self, settings: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model, cases = tiny.tiny_model("llama"), [case(seed) for seed in (1, 2, 3)]
        replaying = configurations(model, parse_methods("methods", "kvzip"), BUDGETS[:1], settings)[1:]
        chosen, runner = [*all_of(model, settings, BUDGETS[:1]), *replaying], Runner(model, tokenizer)
        with passes(model) as seen:
            together = list(runner.run_together([(one, chosen) for one in cases]))
        assert seen.count(NUM_CONTEXT) == 1 + int("agnostic" in settings), "read once, and again for what replays"
        assert seen.count(NUM_PROMPT) == len(cases), "in the aware setting each prompt is replayed as a whole"
        alone = [record for one in cases for record in runner.run(one, chosen)]
        assert [record.key for record in together] == [record.key for record in alone]
        for one, other in zip(together, alone, strict=True):
            assert (one.token_ids, one.prompt_sha256) == (other.token_ids, other.prompt_sha256)
            assert (one.retained_tokens, one.kv_nbytes) == (other.retained_tokens, other.kv_nbytes)
        assert len({tuple(record.token_ids or ()) for record in together if record.method == "full"}) == len(cases)

    def test_a_budget_above_the_document_loses_nothing(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        full, *others = Runner(model, tokenizer).run(case(), all_of(model, ("agnostic",), (NUM_CONTEXT, 1.0)))
        for record in others:
            assert record.token_ids == full.token_ids
            assert (record.retained_tokens, record.evidence_recall, record.top1_agreement) == (NUM_PROMPT, 1, 1)
            assert record.kl_divergence == pytest.approx(0, abs=1e-6)

    def test_where_no_question_follows_both_settings_are_one(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = tiny.tiny_model("llama")
        records = by_config(Runner(model, tokenizer).run(case(suffix_start=NUM_PROMPT), all_of(model, SETTINGS)))
        assert len(records) == 1 + 2 * len(METHODS) * len(BUDGETS)
        for record in records.values():
            if record.setting == "agnostic":
                aware = records[record.config.removesuffix(" (agnostic)")]
                assert timeless(structs.replace(record, setting="aware")) == timeless(aware)


def test_a_run_without_evicting_methods_is_the_full_cache_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny.tiny_model("llama")
    chosen = configurations(model, parse_methods("methods", "full"), BUDGETS)
    with passes(model) as seen:
        (record,) = Runner(model, tokenizer).run(case(), chosen)
    assert record.config == "full"
    assert seen[0] == NUM_PROMPT
