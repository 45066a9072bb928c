"""Decoding by a compiled step gives what decoding without one gives, and stands aside where it cannot."""

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import compresskv
import tiny
from compresskv.attention.routing import routing
from compresskv.cache.stores import packed
from compresskv.cache.stores.base import ROOM
from compresskv.compiled import decoding, export, package
from compresskv.compiled.inputs import kinds_of
from compresskv.compiled.narrow import narrow_weights
from compresskv.compiled.step import Step
from compresskv.compression import Compressing
from compresskv.models.shape import compressible_layers

NUM_PROMPT = 70
NUM_STEPS = ROOM + 6  # so that every layer needs new room once
COMPILED = [("qwen2", "blend"), ("gemma3", "snapkv")]  # ragged heads; equal ones, beside sliding windows


def context(
    model: PreTrainedModel, method: str, compile: str, budget: float = 24, store: str = "native"
) -> Compressing:
    options = tiny.options_for(model, method)
    return compresskv.compressing(model, method, budget, compile=compile, store=store, **options)


def assert_near(found: Tensor, expected: Tensor, store: str) -> None:
    # A new token's number that lies between two codes, but for rounding, may get either.
    tolerance = 2e-4 if store == "native" else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert float((found - expected).abs().mean()) < 2e-4


def check_equal(model: PreTrainedModel, method: str, store: str = "native") -> None:
    sequence = tiny.random_tokens(NUM_PROMPT + NUM_STEPS)
    steps = [NUM_PROMPT] + [1] * NUM_STEPS
    with context(model, method, "never", store=store) as cache:
        expected, held = tiny.read(model, cache, sequence, steps), cache
    with context(model, method, "always", store=store) as cache:
        found = tiny.read(model, cache, sequence, steps)
    assert (cache.num_compiled_steps, cache.not_compiled) == (NUM_STEPS, None)
    assert_near(found, expected, store)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    for own, other in zip(cache.compressed_layers, held.compressed_layers, strict=True):
        assert own.seen_tokens == other.seen_tokens == NUM_PROMPT + NUM_STEPS
        assert own.num_retained == other.num_retained
        for one, two in zip(parts(own), parts(other), strict=True):
            assert one.shape == two.shape
            assert float((one - two).abs().mean()) < (1e-4 if store == "native" else 5e-3)


def check_unpacks_nothing_first(model: PreTrainedModel) -> None:
    (kinds,) = decoding._loaded[model]
    program = package.package_folder(model, kinds) / "step.pt2"
    assert b"aoti_torch_cpu_packed_attention" in program.read_bytes()


def layers_of(model: PreTrainedModel) -> list[Any]:
    return DynamicCache(config=model.config).layers


def parts(layer: Any) -> list[Tensor]:
    return [states for head in layer.store.heads() for states in head]


@pytest.mark.stores("ragged", reason="no compiled step writes to the naive store")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama_mha"])
def test_the_step_computes_what_the_model_does(family: str, method: str) -> None:
    check_equal(tiny.tiny_model(family), method)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "blend", "compresskv", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "llama_mha"])
def test_the_step_reads_what_is_packed(family: str, method: str, store: str) -> None:
    check_equal(tiny.tiny_model(family), method, store)


@pytest.mark.stores(reason="what is packed has stores of its own")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_step_unpacks_where_it_cannot_read_codes(
    family: str, method: str, store: str, unpacked: list[Tensor]
) -> None:
    model = tiny.tiny_model(family)
    check_equal(model, method, store)
    assert len(unpacked) >= NUM_STEPS * len(compressible_layers(model))


@pytest.mark.slow
@pytest.mark.usefixtures("stored_packages")
@pytest.mark.parametrize(("family", "store"), [("qwen2", "int4k8"), ("qwen3", "int2")])
def test_compiled_with_packed_entries_in_ragged_heads(family: str, store: str) -> None:
    model = tiny.tiny_model(family)
    check_equal(model, "blend", store)
    check_unpacks_nothing_first(model)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma2"])
def test_with_eager_attention(family: str) -> None:
    check_equal(tiny.tiny_model(family, "eager"), "snapkv")


@pytest.mark.slow
@pytest.mark.stores(reason="each store would be compiled anew")
@pytest.mark.usefixtures("stored_packages")
@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_compiled(family: str, method: str) -> None:
    check_equal(tiny.tiny_model(family), method)


@pytest.mark.slow
@pytest.mark.usefixtures("stored_packages")
def test_half_precision() -> None:
    method, model = "adakv", tiny.tiny_model("llama", dtype=torch.bfloat16)
    sequence, steps = tiny.random_tokens(NUM_PROMPT + 8), [NUM_PROMPT] + [1] * 8
    with context(model, method, "never") as cache:
        expected = tiny.read(model, cache, sequence, steps)
    with context(model, method, "always") as cache:
        found = tiny.read(model, cache, sequence, steps)
    assert (cache.num_compiled_steps, cache.not_compiled) == (8, None)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.03 * float(expected.abs().max()))


@pytest.mark.usefixtures("stored_packages")
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.5}])
def test_generate(options: dict[str, Any]) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    texts = []
    for compile in ("never", "always"):
        torch.manual_seed(3)
        with context(model, "snapkv", compile) as cache:
            texts.append(tiny.generate(model, prompt, cache, **options).tolist())
    assert texts[0] == texts[1]
    assert cache.num_compiled_steps == 9


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_what_is_not_one_more_token_of_one_row_goes_the_usual_way(method: str) -> None:
    model = tiny.tiny_model("llama")
    rows, masks = tiny.left_padded([tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(NUM_PROMPT - 9, seed=1)])
    with context(model, method, "always") as cache:
        tiny.generate(model, rows, cache, attention_mask=masks)
        assert cache.num_compiled_steps == 0
    with context(model, method, "always") as cache:
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache, num_beams=2)
        assert cache.num_compiled_steps == 0
    with context(model, method, "always") as cache:  # one padded row
        tiny.generate(model, rows[1:], cache, attention_mask=masks[1:])
        assert cache.num_compiled_steps == 0


@pytest.mark.stores("ragged", reason="no compiled step writes to the naive store")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_both_ways_alternate_on_one_cache_and_its_copies(
    method: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 4)
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + 20)
    steps = [NUM_PROMPT, 1, 1, 3, 1, 1, 5, 1, 1, 1]
    with context(model, method, "never", store=store) as cache:
        expected = tiny.read(model, cache, sequence, steps)
    with context(model, method, "always", store=store) as cache:
        found = tiny.read(model, cache, sequence, steps[:-3])
        branch = copy.deepcopy(cache)
        rest = tiny.read(model, cache, sequence, steps[-3:])
        assert cache.num_compiled_steps == 7
        again = tiny.read(model, branch, sequence, steps[-3:])  # a copy is not this context's cache
        assert branch.num_compiled_steps == 4
        cache.crop(-2)
        once_more = tiny.read(model, cache, sequence, [1, 1])
    assert_near(torch.cat([found, rest], dim=1), expected, store)
    assert_near(again, rest, store)
    assert_near(once_more, rest[:, -2:], store)


@pytest.mark.usefixtures("uncompiled")
def test_another_prompt_may_need_another_step() -> None:
    model = tiny.tiny_model("llama")
    short, long = tiny.random_tokens(20), tiny.random_tokens(NUM_PROMPT)
    with context(model, "adakv", "always") as cache:  # within the budget, all heads hold the same
        for number, prompt in enumerate((short, long, short), start=1):
            tokens = tiny.generate(model, prompt, cache)
            with context(model, "adakv", "never") as plain:
                assert tokens.tolist() == tiny.generate(model, prompt, plain).tolist()
            assert cache.num_compiled_steps == 9 * number
            cache.reset()


@pytest.mark.usefixtures("uncompiled")
def test_the_model_gets_its_forward_back() -> None:
    model = tiny.tiny_model("llama")
    first, second = context(model, "snapkv", "always"), context(model, "snapkv", "always")
    first.__enter__()
    with second as cache:
        first.__exit__(None, None, None)  # not in the order in which they began
        assert "forward" in model.__dict__
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache)
        assert cache.num_compiled_steps == 9
    assert "forward" not in model.__dict__


def test_an_unknown_mode() -> None:
    with pytest.raises(compresskv.ConfigError, match="compile='maybe' is unknown: choose from never, auto, always"):
        context(tiny.tiny_model("llama"), "snapkv", "maybe")


@pytest.mark.usefixtures("stored_packages")
def test_auto_loads_what_was_built_once_it_pays(
    monkeypatch: pytest.MonkeyPatch, packages: Path, tmp_path: Path
) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
    with context(model, "snapkv", "auto") as cache:
        tiny.generate(model, prompt, cache)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(packages))
    assert cache.num_compiled_steps == 0
    assert "compresskv compile" in str(cache.not_compiled)

    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
    assert package.build_times(model, kinds_of(cache)) is not None
    decoding._loaded.clear()
    monkeypatch.setattr(decoding, "build_times", lambda *_: package.BuildTimes(compile_s=1.0, load_s=1e6))
    with context(model, "snapkv", "auto") as cache:  # the answer is over before loading would have paid
        tiny.generate(model, prompt, cache)
    assert (cache.num_compiled_steps, cache.not_compiled) == (0, None)

    monkeypatch.setattr(decoding, "build_times", lambda *_: package.BuildTimes(compile_s=1.0, load_s=0.0))
    with context(model, "snapkv", "auto") as cache:
        tiny.generate(model, prompt, cache)
    assert cache.num_compiled_steps == 9
    with context(model, "snapkv", "auto") as cache:  # what is in memory is used at once
        tiny.generate(model, prompt, cache)
    assert (cache.num_compiled_steps, round(cache.compile_s, 1)) == (9, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_read_in_16_bits_are_the_same_weights(family: str, dtype: torch.dtype) -> None:
    model = tiny.build_model(family).to(dtype).float()
    kinds = tuple("sliding" if one is DynamicSlidingWindowLayer else "even" for one in map(type, layers_of(model)))
    copies = narrow_weights(model).copies(model)
    assert {one.dtype for one in copies.values()} == {dtype}
    with routing(model):
        (expected, _), (found, _) = (
            Step(model, kinds, narrow)(*export.example_inputs(model, kinds).as_args()) for narrow in (None, copies)
        )
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("stored_packages")
def test_compiled_with_weights_read_in_16_bits_and_packed_entries() -> None:
    model = tiny.build_model("llama").bfloat16().float()
    model.lm_head.weight = model.model.embed_tokens.weight
    check_equal(model, "snapkv", "int4")
    check_unpacks_nothing_first(model)
    (loaded,) = decoding._loaded[model].values()
    assert isinstance(loaded, package.Package)
    own = {name: one for name, one in loaded._constants.items() if not name.startswith("_tensor_constant")}
    read = [one for one in own.values() if one.ndim == 2]
    assert {one.dtype for one in read} == {torch.bfloat16}  # the embedding's as well
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data += torch.linspace(-1, 1, weight.numel()).view(weight.shape).bfloat16()
    assert not loaded.fits(model)
    weight.data = weight.data.bfloat16().float()
    check_equal(model, "snapkv", "int4")


@pytest.mark.usefixtures("stored_packages")
def test_new_weights_are_seen() -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with context(model, "snapkv", "always") as cache:
        before = tiny.generate(model, prompt, cache).tolist()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, dims=0), requires_grad=False)
    with context(model, "snapkv", "always") as cache:
        after = tiny.generate(model, prompt, cache).tolist()
    assert cache.num_compiled_steps == 9
    with context(model, "snapkv", "never") as cache:
        assert after == tiny.generate(model, prompt, cache).tolist() != before


@pytest.mark.usefixtures("stored_packages")
def test_a_damaged_package_is_told_of_by_auto(monkeypatch: pytest.MonkeyPatch, packages: Path, tmp_path: Path) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
        kinds = kinds_of(cache)
    decoding._loaded.clear()
    built = package.package_folder(model, kinds)
    assert built.is_dir()
    assert list(built.iterdir())
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
    shutil.copytree(built, package.package_folder(model, kinds))
    damaged = package.package_folder(model, kinds)
    for name in ("step.pt2", "constants.pt"):
        (damaged / name).write_bytes(b"damaged")
        with context(model, "snapkv", "auto") as cache, monkeypatch.context() as patch:
            patch.setattr(decoding, "build_times", lambda *_: package.BuildTimes(compile_s=1.0, load_s=0.0))
            tiny.generate(model, prompt, cache)
        assert cache.num_compiled_steps == 0
        assert "cannot be loaded" in str(cache.not_compiled)
        shutil.copyfile(built / name, damaged / name)


@pytest.mark.usefixtures("stored_packages")
def test_without_a_compiler_decoding_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
    model, prompt = tiny.tiny_model("qwen2"), tiny.random_tokens(NUM_PROMPT)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, context(model, "snapkv", "always") as cache:
        tokens = tiny.generate(model, prompt, cache).tolist()
    assert cache.not_compiled == (
        "PyTorch finds no C++ compiler: install g++, or another one and name it in the variable CXX"
    )
    with context(model, "snapkv", "never") as cache:
        assert tokens == tiny.generate(model, prompt, cache).tolist()


@pytest.mark.usefixtures("stored_packages")
def test_waiting_for_another_builder_is_told() -> None:
    model = tiny.tiny_model("llama")
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache)
        kinds = kinds_of(cache)
    folder, told = package.package_folder(model, kinds), []
    other = filelock.FileLock(folder.with_suffix(".lock"), thread_local=False)

    def report(message: str, _fraction: float | None) -> None:
        told.append(message)
        other.release()

    with other:
        package._build_alone(model, kinds, folder, report)
    assert told == ["waiting for another process that compiles the same step"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("attention", tiny.ATTENTIONS)
def test_ragged_heads_need_plain_attention(attention: str) -> None:
    model = tiny.tiny_model("gemma2" if attention == "sdpa" else "llama", "eager")
    with context(model, "adakv", "always") as cache, pytest.raises(compresskv.ModelError, match="plain sdpa"):
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache)


@pytest.mark.usefixtures("stored_packages")
@pytest.mark.parametrize("change", ["dtype", "training", "hidden_states", "hook"])
def test_a_changed_model_is_noticed(change: str) -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
    assert cache.num_compiled_steps == 9
    package_before = decoding._loaded[model][kinds_of(cache)]
    assert package_before.fits(model)
    if change == "dtype":
        model.to(torch.bfloat16)
        assert not package_before.fits(model)
        return
    handles = []
    if change == "training":
        model.train()
    elif change == "hidden_states":
        model.config.output_hidden_states = True
    else:
        handles.append(model.model.layers[0].register_forward_hook(lambda *_: None))
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
    assert cache.num_compiled_steps == 0
    assert (change == "hook") == ("hooks" in str(cache.not_compiled))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("change", ["hook", "weights", "number", "list", "dict"])
def test_a_model_that_changed_between_prompts_is_noticed_on_the_same_cache(change: str) -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(NUM_PROMPT)
    attention = model.model.layers[0].self_attn
    attention.adapters, attention.scales = ["first"], {"first": 1.0}  # as libraries of adapters keep theirs
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
        made = decoding._loaded[model][kinds_of(cache)]
        assert cache.num_compiled_steps == 9
        cache.reset()
        if change == "hook":
            model.model.layers[0].register_forward_hook(lambda *_: None)
        elif change == "number":
            attention.scaling *= 2
        elif change == "list":
            attention.adapters[0] = "second"
        elif change == "dict":
            attention.scales["first"] = 0.5
        else:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, dims=0), requires_grad=False)
        found = tiny.generate(model, prompt, cache)
    assert cache.num_compiled_steps == (9 if change == "hook" else 18)
    assert (decoding._loaded[model].popitem()[1] is made) == (change == "hook")
    with context(model, "snapkv", "never") as cache:
        assert found.tolist() == tiny.generate(model, prompt, cache).tolist()


@pytest.mark.usefixtures("uncompiled")
def test_a_model_that_was_asked_for_its_attentions_is_compiled_all_the_same() -> None:
    model, prompt = tiny.build_model("llama", "eager"), tiny.random_tokens(NUM_PROMPT)
    before = package.package_folder(model, ("even",) * 4)
    assert model(prompt, output_attentions=True, output_hidden_states=True).attentions is not None
    assert any(module._forward_hooks for module in model.modules()), "otherwise this tests nothing"
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, prompt, cache)
    assert (cache.num_compiled_steps, cache.not_compiled) == (9, None)
    assert package.package_folder(model, ("even",) * 4) == before


@pytest.mark.usefixtures("uncompiled")
def test_threads_that_enter_one_context_leave_the_others_alone() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    shared, entered, left = context(model, "snapkv", "always"), threading.Event(), threading.Event()
    counts: list[int] = []

    def generate() -> None:
        with shared as cache:
            entered.set()
            assert left.wait(60)
            tiny.generate(model, prompt, cache)
            shared.prepare_decoding()
            counts.append(cache.num_compiled_steps)

    thread = threading.Thread(target=generate)
    with shared as cache:
        thread.start()
        assert entered.wait(60)
        tiny.generate(model, prompt, cache)
        assert cache.num_compiled_steps == 9
    left.set()
    thread.join()
    assert counts == [9]


def test_tied_weights_make_another_package() -> None:
    model = tiny.build_model("llama")
    kinds = ("even",) * 4
    before = package.package_folder(model, kinds)
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = package.package_folder(model, kinds)
    model.self_attn_scaling = 0.5
    assert len({before, tied, package.package_folder(model, kinds)}) == 3


@pytest.mark.usefixtures("stored_packages")
def test_auto_never_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where the step of another kind of layer is there."""
    model = tiny.tiny_model("llama")
    with context(model, "snapkv", "always") as cache:
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache)
    decoding._loaded.clear()
    monkeypatch.setattr(package, "_build", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(package, "build_times", built_even(package.build_times))
    monkeypatch.setattr(decoding, "build_times", built_even(lambda *_: package.BuildTimes(1.0, 0.0)))
    with context(model, "adakv", "auto") as cache:
        tiny.generate(model, tiny.random_tokens(20), cache)  # within the budget: all heads hold the same
        assert cache.num_compiled_steps == 9
        cache.reset()
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache)
        assert cache.num_compiled_steps == 9
        assert "compresskv compile" in str(cache.not_compiled)
        cache.reset()
        tiny.generate(model, tiny.random_tokens(20), cache)
        assert (cache.num_compiled_steps, cache.not_compiled) == (18, None)


def built_even(facts: Any) -> Any:
    return lambda model, kinds: facts(model, kinds) if "even" in kinds else None


@pytest.mark.usefixtures("uncompiled")
def test_a_prompt_of_one_token_before_sliding_windows() -> None:
    model, sequence = tiny.tiny_model("gemma3"), tiny.random_tokens(40)
    steps = [1] * 40
    with context(model, "snapkv", "never") as cache:
        expected = tiny.read(model, cache, sequence, steps)
    with context(model, "snapkv", "always") as cache:
        found = tiny.read(model, cache, sequence, steps)
    assert cache.num_compiled_steps == 38  # the prompt, and a window that holds one token, go the usual way
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
