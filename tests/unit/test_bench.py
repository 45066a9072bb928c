"""What the speed benchmark counts and compares. How long anything takes is never tested."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from compresskv.bench import geometry, run
from compresskv.bench.config import BenchConfig, Stage, our_stages, parse_bench_budgets, within_budget
from compresskv.bench.contender import Ours, Plain
from compresskv.bench.continuation import Prefill
from compresskv.bench.figure import draw_run, row_name
from compresskv.bench.geometry import GEOMETRIES, find_geometry, random_model, random_profile
from compresskv.bench.limits import Limits, decode_nbytes, measure_limits, prefill_flop
from compresskv.bench.rounds import Sample, run_rounds
from compresskv.bench.row import Row, make_row
from compresskv.bench.run import Bench
from compresskv.bench.subject import Subject
from compresskv.errors import ConfigError, ModelError
from compresskv.methods import registry
from compresskv.methods.prepare import prepare_method
from compresskv.selection.budgets import SharedBudget
from compresskv.selection.byte_budget import Costs
from compresskv.system import memory
from compresskv.system.clock import Stopwatch
from compresskv.system.convert import convert
from tiny import EVICTING_METHODS, build_model, generate, options_for, random_tokens, tiny_model

CPU = torch.device("cpu")


def config(**changes: Any) -> BenchConfig:
    return BenchConfig(
        **{"lengths": (96,), "budgets": (40,), "has_full": True, "repeats": 2, "new_tokens": 11, **changes}
    )


def ours(name: str, budget: int | float | None) -> Ours:
    model = tiny_model("llama")
    return Ours(name, prepare_method(model, name, **options_for(model, name)), budget)


def sample(prefill_s: float = 1.0, step_s: float = 1.0, **changes: Any) -> Sample:
    figures = {
        "prompt_tokens": 10,
        "held_tokens": 10.0,
        "prefill_s": prefill_s,
        "scoring_s": 0.0,
        "eviction_s": 0.0,
        "num_scorings": 0,
        "first_token_s": prefill_s,
        "kv_nbytes": 100,
        "peak_nbytes": None,
        **changes,
    }
    return Sample(Prefill(**figures), (step_s,) * 3, (1, 2, 3, 4))


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"lengths": ()}, "lengths="),
            ({"lengths": (128, 0)}, "lengths=0"),
            ({"budgets": (0,)}, "budget=0"),
            ({"budgets": (40, "auto")}, "budgets='auto' depends on each prompt"),
            ({"budgets": ("3XB",)}, "budget='3XB' is text, and names no bytes"),
            ({"repeats": 0}, "repeats=0"),
            ({"new_tokens": 1}, "new_tokens=1"),
        ],
    )
    def test_what_cannot_work_is_named(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            config(**changes)

    def test_the_longest_prompt_makes_room_for_what_follows_it(self) -> None:
        asked = config(lengths=(100, 512))
        fitted = asked.fitted(512, strict=True)
        assert fitted.lengths == (100, 512 - 11)
        (change,) = asked.changes(fitted)
        assert "512 tokens are cut to 501" in change

    def test_longer_than_the_context(self) -> None:
        with pytest.raises(ConfigError, match="lengths=1024 does not fit into the model's context of 512"):
            config(lengths=(100, 1024)).fitted(512, strict=True)
        assert config(lengths=(100, 1024)).fitted(512, strict=False).lengths == (100,)
        assert config(lengths=(1024,)).fitted(None, strict=True).lengths == (1024,)

    @pytest.mark.parametrize("strict", [True, False])
    def test_an_answer_longer_than_the_context(self, strict: bool) -> None:
        with pytest.raises(ConfigError, match="new_tokens=512 leaves no room in the model's context of 512 tokens"):
            replace(config(lengths=(100,)), new_tokens=512).fitted(512, strict=strict)

    @pytest.mark.parametrize(
        ("text", "budgets", "has_full"),
        [
            ("128,full", (128,), True),
            ("full", (), True),
            ("64, 3%", (64, 0.03), False),
            ("3MB,5% of bytes, 64", ("3MB", "5% of bytes", 64), False),
        ],
    )
    def test_budgets(self, text: str, budgets: tuple[SharedBudget, ...], has_full: bool) -> None:
        assert parse_bench_budgets(text) == (budgets, has_full)

    def test_no_budget_at_all(self) -> None:
        with pytest.raises(ConfigError, match="budgets="):
            parse_bench_budgets(",")

    def test_within_budget(self) -> None:
        assert within_budget(128, 128)
        assert not within_budget(128, 129)
        assert not within_budget(0.5, 2)
        assert not within_budget(None, 2)  # the full cache is never compressed
        assert [within_budget("1kB", 4, Costs(full=256, held=held)) for held in (256, 251, 250, 64)] == [
            *(False, False, True, True)
        ]


class TestStages:
    def names(self, stage: Stage) -> list[tuple[str, int | float | None, int | None]]:
        return [(one.method, one.budget, one.max_prompt) for one in stage.contenders]

    def test_each_length_then_prompts_of_just_a_budget(self) -> None:
        methods = {"snapkv": registry.create("snapkv")}
        long, short = our_stages(config(budgets=(40, 0.5)), methods)

        assert (long.length, short.length) == (96, 40)
        assert self.names(long) == [
            ("plain", None, None),
            ("full", None, None),
            ("snapkv", 40, None),
            ("snapkv", 0.5, None),
            ("plain", None, 40),
        ]
        assert self.names(short) == [("plain", None, None), ("full", None, None), ("snapkv", 40, None)]
        assert (long.place_of_short(40), long.place_of_short(0.5), long.place_of_short(None)) == (4, None, None)

    def test_a_budget_beyond_all_lengths_has_no_stage_of_its_own(self) -> None:
        assert [stage.length for stage in our_stages(config(budgets=(40, 500)), {})] == [96, 40]

    def test_full_as_a_method_is_the_full_budget(self) -> None:
        (stage, _) = our_stages(config(has_full=False), {"full": registry.create("full")})
        assert self.names(stage) == [("plain", None, None), ("full", None, None), ("plain", None, 40)]


class TestRounds:
    def run(self, *contenders: Any, num_tokens: int = 96) -> list[list[Sample]]:
        steps: list[None] = []
        samples = run_rounds(
            tiny_model("llama"),
            random_tokens(num_tokens),
            contenders,
            num_rounds=2,
            num_new_tokens=11,
            on_step=lambda: steps.append(None),
        )
        assert len(steps) == 2 * len(contenders)
        return samples

    def test_all_decode_in_turns_and_yet_each_as_if_alone(self) -> None:
        expected = generate(tiny_model("llama"), random_tokens(96), max_new_tokens=11)[0].tolist()
        plain, full, evicting, short = self.run(Plain(), ours("full", None), ours("snapkv", 40), Plain(max_prompt=40))

        assert [list(one.tokens) for one in plain + full] == [expected] * 4
        assert all(len(one.steps_s) == 10 for one in plain + evicting)
        assert evicting[0].tokens == evicting[1].tokens
        assert [one.prefill.prompt_tokens for one in (plain[0], short[0])] == [96, 40]

    def test_bytes_and_tokens_are_those_held(self) -> None:
        plain, evicting = self.run(Plain(), ours("snapkv", 40))
        nbytes_a_token = 4 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
        assert plain[0].prefill.kv_nbytes == 96 * nbytes_a_token
        assert evicting[0].prefill.kv_nbytes == 40 * nbytes_a_token
        assert evicting[0].prefill.held_tokens == 40

    def test_stores_are_measured_beside_one_another(self) -> None:
        model, methods = tiny_model("llama"), {"snapkv": registry.create("snapkv")}
        (stage, _) = our_stages(config(budgets=(40,), stores=("native", "int4"), has_full=False), methods)
        own = [one for one in stage.contenders if isinstance(one, Ours)]
        assert [(one.method, one.budget) for one in own] == [("snapkv", 40), ("snapkv int4", 40)]
        native, packed = (one.start(model, random_tokens(96)).prefill for one in own)
        assert native.held_tokens == packed.held_tokens == 40
        assert packed.kv_nbytes < native.kv_nbytes / 2
        with pytest.raises(ConfigError, match="stores='int5' is unknown"):
            config(stores=("int5",))

    def test_stores_hold_as_many_bytes_where_that_is_the_budget(self) -> None:
        """So many tokens as they have room for; plain transformers on a prompt of as many tokens stands for none."""
        model, methods = tiny_model("llama"), {"snapkv": registry.create("snapkv")}
        asked = config(budgets=("25% of bytes", "12kB"), stores=("native", "int8"), has_full=False)
        (stage,) = our_stages(asked, methods)
        assert [(one.method, one.budget) for one in stage.contenders] == [
            ("plain", None),
            *((method, budget) for budget in asked.budgets for method in ("snapkv", "snapkv int8")),
        ]
        full, *held = (one.start(model, random_tokens(96)).prefill for one in stage.contenders)
        for native, packed in (held[:2], held[2:]):
            assert 2 * native.held_tokens < packed.held_tokens
            assert packed.kv_nbytes == pytest.approx(native.kv_nbytes, rel=0.05)
        assert held[0].kv_nbytes == full.kv_nbytes // 4
        assert max(one.kv_nbytes for one in held[2:]) <= 12_000
        assert [stage.place_of_short(budget) for budget in asked.budgets] == [None, None]

    @pytest.mark.parametrize("method", EVICTING_METHODS)
    def test_scoring_is_seen_above_the_budget_and_absent_below_it(self, method: str) -> None:
        above, below = self.run(ours(method, 40), ours(method, 96))

        for one in (found.prefill for found in above):
            assert one.num_scorings
            assert one.scoring_s is not None
            assert 0 < one.scoring_s < one.eviction_s < one.prefill_s <= one.first_token_s
        assert [(one.prefill.num_scorings, one.prefill.scoring_s) for one in below] == [(0, 0.0)] * 2

    def test_peak_memory_where_the_system_can_tell(self) -> None:
        works = memory.reset_peak(CPU)
        assert [(one.prefill.peak_nbytes is not None) for one in self.run(Plain())[0]] == [works] * 2


class TestRow:
    GIVEN: ClassVar[dict[str, Any]] = {
        "engine": "compresskv",
        "length": 10,
        "within_budget": False,
        "prefill_flop": 1000,
        "decode_nbytes": 500,
    }

    def test_ratios_are_taken_within_rounds(self) -> None:
        """The machine is ten times slower in the second round: a ratio of medians would say 1.0."""
        own = [sample(2.0, 0.5), sample(20.0, 5.0)]
        plain = [sample(1.0, 1.0), sample(10.0, 10.0)]
        row = make_row(Plain(), own, plain, own, **self.GIVEN)

        assert (row.prefill_ratio, row.first_token_ratio, row.decode_ratio) == (2.0, 2.0, 0.5)
        assert (row.decode_ratio_short, row.kv_ratio, row.peak_ratio) == (1.0, 1.0, None)
        assert row.prefill_s == 11.0
        assert row.decode_ms == 2750.0
        assert [one["decode_ms"] for one in row.rounds] == [500.0, 5000.0]

    def test_what_was_not_measured_is_none(self) -> None:
        row = make_row(Plain(), [sample(scoring_s=None)], [sample(peak_nbytes=5)], None, **self.GIVEN)
        assert (row.scoring_s, row.peak_nbytes, row.peak_ratio, row.decode_ratio_short) == (None,) * 4

    def test_the_least_times(self) -> None:
        row = make_row(Plain(), [sample(1.0, 2.0)], [sample()], None, **self.GIVEN).to_dict(Limits(100.0, 2000.0))
        assert (row["least_prefill_s"], row["prefill_to_least"]) == (0.5, 2.0)
        assert (row["least_decode_ms"], row["decode_to_least"]) == (5000.0, 0.4)


class TestLimits:
    def test_operations_are_those_that_torch_counts(self) -> None:
        model, num_tokens = tiny_model("qwen3", "eager"), 24
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(random_tokens(num_tokens), logits_to_keep=1)
        unmasked = 4 * 6 * 16 * 4  # two products, query heads, head size, layers
        hidden_by_mask = num_tokens**2 - num_tokens * (num_tokens + 1) // 2
        rotary = counter.get_total_flops() - prefill_flop(model, num_tokens) - unmasked * hidden_by_mask
        assert 0 <= rotary < 0.01 * counter.get_total_flops()  # torch counts the angles' outer product, too

    def test_a_sliding_window_bounds_attention(self) -> None:
        model = tiny_model("mistral_sliding")
        growth = [prefill_flop(model, tokens + 1) - prefill_flop(model, tokens) for tokens in (5, 200, 400)]
        assert growth[0] < growth[1] == growth[2]

    def test_an_input_embedding_of_its_own_is_not_read(self) -> None:
        model = build_model("llama")
        assert not model.config.tie_word_embeddings
        weights = sum(weight.nbytes for weight in model.parameters())
        assert decode_nbytes(model, 7) == weights - model.get_input_embeddings().weight.nbytes + 7
        model.lm_head.weight = model.get_input_embeddings().weight
        assert decode_nbytes(model, 0) == sum(weight.nbytes for weight in model.parameters())

    def test_both_are_measured(self) -> None:
        limits = measure_limits(CPU, torch.bfloat16)
        assert limits.read_bytes_per_s > 0
        assert limits.matmul_flop_per_s > 0
        assert limits.best(Limits(0.0, 1e30)) == Limits(limits.read_bytes_per_s, 1e30)


class TestStopwatch:
    def test_what_fails_is_counted_too(self) -> None:
        watch = Stopwatch(CPU)
        with watch.running():
            pass
        with pytest.raises(TypeError), watch.running():
            max()  # type: ignore[call-overload]
        assert watch.num_runs == 2
        assert watch.seconds > 0


class TestGeometry:
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_every_geometry_makes_a_model(self, name: str) -> None:
        """Parameter counts are those on the models' own pages."""
        millions = {
            "smollm2-135m": 134.5,
            "qwen2.5-0.5b": 494.0,
            "qwen3-0.6b": 596.0,
            "llama-1b": 1235.8,
            "llama-3b": 3212.7,
            "mistral-7b": 7248.0,
            "llama-8b": 8030.3,
        }
        config = GEOMETRIES[name].config(GEOMETRIES[name].num_hidden_layers, 1000)
        assert config.max_position_embeddings == 1000
        assert {type(layer) for layer in DynamicCache(config=config).layers} == {DynamicLayer}  # all can be compressed
        if name in millions:
            assert geometry._num_parameters(config) / 1e6 == pytest.approx(millions[name], rel=1e-3)

    def test_the_same_weights_again_and_torch_s_own_generator_untouched(self) -> None:
        before = torch.random.get_rng_state()
        first, second = (random_model("tiny", 2, 100, torch.float32, CPU).model for _ in range(2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(first.lm_head.weight, second.lm_head.weight)
        assert len(first.model.layers) == 2

    def test_an_unknown_name_gets_a_suggestion(self) -> None:
        with pytest.raises(ConfigError, match="random='lama-8b' is unknown: did you mean 'llama-8b'"):
            find_geometry("lama-8b")

    def test_layers_are_cut_to_what_memory_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = sum(weight.nbytes for weight in random_model("tiny", 2, 100, torch.float32, CPU).model.parameters())
        caches = 3 * 100 * 2 * (2 * 2 * 8 * 4)  # each of 100 tokens, 2 layers
        monkeypatch.setattr(memory, "available_nbytes", lambda device: 2 * (weights + caches) + 1000)

        built = random_model("tiny", None, 100, torch.float32, CPU)
        assert built.model.config.num_hidden_layers == 2
        assert built.note == "layers of random tiny: 2 instead of 4"
        with pytest.raises(ConfigError, match=r"random='tiny' with 3 layers .* does not fit"):
            random_model("tiny", 3, 100, torch.float32, CPU)

    def test_the_profile_serves_every_method(self) -> None:
        model = tiny_model("gemma3")
        profile = random_profile(model)
        for name in EVICTING_METHODS:
            if registry.methods()[name].needs_profile:
                prepare_method(model, name, profile)


class TestRun:
    @pytest.fixture
    def bench(self, monkeypatch: pytest.MonkeyPatch) -> Bench:
        monkeypatch.setattr(run, "measure_limits", lambda device, dtype: Limits(1e9, 1e9))
        tokens = random_tokens(200)
        return Bench(Subject("tiny", tiny_model("llama"), lambda count: tokens[:, :count], random=True), config())

    def test_what_was_done_before_an_interrupt_is_there(self, bench: Bench) -> None:
        def interrupt(message: str, fraction: float) -> None:
            if message.startswith("40 "):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bench.run(our_stages(bench.config, {}), interrupt)
        assert [(row["method"], row["length"]) for row in bench.result()["rows"]] == [("plain", 96), ("full", 96)]

    def test_rows_of_whole_stages_alone_are_taken_over(self, bench: Bench) -> None:
        few, many = our_stages(bench.config, {}), our_stages(bench.config, {"snapkv": registry.create("snapkv")})
        bench.run(few, lambda message, fraction: None)
        limits, rows = Limits(1.0, 2.0), bench.rows
        for stages, taken in ((few, len(few)), (many, 0), (few[:1], 1)):
            other = Bench(bench.subject, bench.config)
            assert other.take_over(rows, limits, ["a note"], stages) == taken
            assert {row.length for row in other.rows} == {stage.length for stage in stages[:taken]}
            assert other.limits == (limits if taken else None)

    def test_budgets_in_bytes_are_told_as_they_were_given(self, bench: Bench) -> None:
        """What a store has room for decides whether there is anything to gain; and such a run can be gone on with."""
        bench.config = config(budgets=("12kB", "30kB"), stores=("native", "int8"), has_full=False, repeats=1)
        stages = our_stages(bench.config, {"snapkv": registry.create("snapkv")})
        bench.run(stages, lambda message, fraction: None)
        rows = json.loads(json.dumps(bench.result()["rows"]))
        assert [(row_name(row), row["budget"], row["within_budget"]) for row in rows] == [
            ("plain", None, False),
            ("snapkv 12kB", "12kB", False),
            ("snapkv int8 12kB", "12kB", False),
            ("snapkv 30kB", "30kB", False),
            ("snapkv int8 30kB", "30kB", True),
        ]
        other = Bench(bench.subject, bench.config)
        assert other.take_over([convert(row, Row) for row in rows], Limits(1.0, 2.0), [], stages) == 1

    def test_the_figure(self, bench: Bench, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        bench.run(our_stages(bench.config, {"snapkv": registry.create("snapkv")}), lambda message, fraction: None)
        result = bench.result()
        for peaks in (None, 1000):  # where memory could not be measured, too
            for row in result["rows"]:
                row["peak_nbytes"] = peaks
            draw_run(result, tmp_path / "run.png")
            assert (tmp_path / "run.png").stat().st_size > 10_000

    def test_out_of_memory_is_one_line(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def exhaust(*args: Any, **options: Any) -> None:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")

        monkeypatch.setattr(run, "run_rounds", exhaust)
        with pytest.raises(ModelError, match="lengths=96: the caches do not fit into memory"):
            bench.run(our_stages(bench.config, {}), lambda message, fraction: None)

    def test_progress_never_goes_back(self, bench: Bench) -> None:
        fractions: list[float] = []
        bench.run(our_stages(bench.config, {}), lambda message, fraction: fractions.append(fraction))
        assert fractions == sorted(fractions)
        assert fractions[-1] == pytest.approx(1)
