"""Prompts that are cut while they are read: every logit is that of a full cache in which what is gone is masked out."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import compresskv
import shrunk
import tiny
from compresskv import CacheStateError, CompressedCache, ConfigError, ModelError, PromptError
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.window import QueryWindow
from compresskv.compression import Compressing
from compresskv.methods import registry
from compresskv.methods.blend import Blend
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.snapkv import SnapKV
from compresskv.selection.cuts import END_TOKENS
from oracle import Evictions, evictions, oracle_logits

NUM_PROMPT, CHUNK, KEPT, BUDGET = 140, 32, 40, 24
STEPS = [NUM_PROMPT, 1, 1, 5, 1]
CUTTING = [name for name, kind in registry.methods().items() if kind().cuts_again and kind.evicts]
MODELS = ["llama sdpa", "llama eager", "gemma3 sdpa", "gpt2 sdpa", "gemma2 eager", "gpt_oss eager"]


def whole(model: object, method: str) -> Compressing:
    return compresskv.compressing(model, method, BUDGET, **tiny.options_for(model, method))


def chunked(model: object, method: str, budget: float = BUDGET, **options: object) -> Compressing:
    options = {"chunk_budget": KEPT, "chunk_tokens": CHUNK, **options}
    return compresskv.compressing(model, method, budget, **tiny.options_for(model, method), **options)


@contextmanager
def noted(cache: CompressedCache) -> Iterator[list[Evictions]]:
    """What was gone when each chunk had been read."""
    found: list[Evictions] = []
    reading = cache.reading_chunk

    @contextmanager
    def noting(num_after: int) -> Iterator[None]:
        if cache.compressed_layers[0].seen_tokens:
            found.append(evictions(cache))
        with reading(num_after):
            yield
        assert all(layer.num_retained <= KEPT + CHUNK for layer in cache.compressed_layers)

    cache.reading_chunk = noting  # type: ignore[method-assign]
    yield found
    found.append(evictions(cache))


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_exact(model: str) -> None:
    family, attention = model.split()
    for method in ("snapkv", "adakv", "vote"):
        own, sequence = tiny.tiny_model(family, attention), tiny.random_tokens(sum(STEPS), batch_size=2)
        with chunked(own, method) as cache, noted(cache) as gone:
            logits = tiny.read(own, cache, sequence, STEPS)
        assert len(gone) == (3 if method == "vote" else 4)  # at 64, 96, 128 but for wide windows, and in the end
        expected = oracle_logits(family, sequence, gone[0], None, *gone[1:])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", CUTTING)
def test_all_methods_keep_as_many_as_ever(method: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    counts = []
    for context in (chunked(model, method), whole(model, method)):
        with context as cache:
            tiny.read(model, cache, prompt, [NUM_PROMPT])
        counts.append(tiny.kept_counts(cache).sum())
    assert counts[0] == counts[1]


def test_a_method_is_told_where_the_tokens_are_that_it_chooses_among(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's keys say it: they are the same whatever was evicted."""
    model, prompt, told = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT), list[LayerInputs]()
    full, observe = DynamicCache(config=model.config), Blend.observe
    tiny.read(model, full, prompt, [NUM_PROMPT])
    monkeypatch.setattr(Blend, "observe", lambda self, inputs: told.append(inputs) or observe(self, inputs))
    with chunked(model, "blend") as cache:
        tiny.read(model, cache, prompt, [NUM_PROMPT])
    first = [inputs for inputs in told if inputs.layer_idx == 0]
    assert len(first) == 3  # at 64 and 96, and in the end
    for inputs in first:
        where = inputs.positions.expand(-1, inputs.num_kv_heads, -1)
        among = full.layers[0].keys.gather(2, where[..., None].expand_as(inputs.keys))
        torch.testing.assert_close(inputs.keys, among)
    assert not torch.equal(first[-1].positions[:, 0], first[-1].positions[:, 1])


@pytest.mark.parametrize("store", ["native", "int8"])
def test_prompts_are_cut_alike_whatever_they_are_read_in(store: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with chunked(model, "snapkv", 0.2, store=store) as cache:
        expected = tiny.generate(model, prompt, cache)
    others = []
    for steps in ([40, 100], [41, 99], [23] * 6 + [2], [22] * 6 + [8]):
        with chunked(model, "snapkv", 0.2, store=store, prompt_tokens=NUM_PROMPT) as other:
            logits = tiny.read(model, other, prompt, steps)
        others.append([int(logits[0, -1].argmax()), *(layer.positions.tolist() for layer in other.compressed_layers)])
    alone = [int(expected[0, 0]), *(layer.positions.tolist() for layer in cache.compressed_layers)]
    assert others[0] == others[1] == alone  # no cut comes before the pass that holds the prompt's end
    assert others[2] == others[3] != alone  # the end is not known yet


@pytest.mark.parametrize("model", MODELS)
def test_a_cut_is_made_for_what_the_prompt_ends_with(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries are those of the end read right behind what was read so far."""
    family, attention = model.split()
    own, prompt, told = tiny.tiny_model(family, attention), tiny.random_tokens(NUM_PROMPT), list[LayerInputs]()
    score = SnapKV.score
    monkeypatch.setattr(SnapKV, "score", lambda self, inputs: told.append(inputs) or score(self, inputs))
    with chunked(own, "snapkv") as cache:
        tiny.read(own, cache, prompt, [NUM_PROMPT])
    num_layers = len(cache.compressed_layers)
    first, ends = told[:num_layers], prompt[:, -END_TOKENS:]
    told.clear()
    with compresskv.compressing(own, "snapkv", BUDGET) as cache:
        tiny.read(own, cache, torch.cat([prompt[:, : 2 * CHUNK], ends], dim=1), [2 * CHUNK + END_TOKENS])
    for cut, whole in zip(first, told, strict=True):
        assert cut.num_tokens == 2 * CHUNK
        torch.testing.assert_close(cut.query_window, whole.query_window, atol=1e-4, rtol=0)
        torch.testing.assert_close(cut.keys, whole.keys[:, :, : 2 * CHUNK], atol=1e-4, rtol=0)


def test_a_window_longer_than_the_end_has_all_its_queries_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pieces layers read in."""
    model, prompt, told = tiny.tiny_model("llama"), tiny.random_tokens(300), list[LayerInputs]()
    score, size, cut = SnapKV.score, END_TOKENS + 8, 128
    monkeypatch.setattr(SnapKV, "score", lambda self, inputs: told.append(inputs) or score(self, inputs))
    options = {"chunk_budget": 100, "chunk_tokens": cut, "window_size": size, "prefill_memory": 1}
    with compresskv.compressing(model, "snapkv", 100, **options) as cache:
        tiny.read(model, cache, prompt, [300])
    first = told[0]
    told.clear()
    with compresskv.compressing(model, "snapkv", 100, window_size=size) as cache:
        tiny.read(model, cache, torch.cat([prompt[:, :cut], prompt[:, -size:]], dim=1), [cut + size])
    assert first.num_tokens == cut
    torch.testing.assert_close(first.query_window, told[0].query_window, atol=1e-4, rtol=0)


def test_images_that_reach_several_layers_are_refused() -> None:
    """Which of their features belong to a chunk is not known."""
    if "qwen3_vl" not in shrunk.types():
        pytest.skip("these transformers do not know it")
    model, prompt = shrunk.build("qwen3_vl", vision_config={"deepstack_visual_indexes": [1, 2]}), tiny.random_tokens(90)
    vision, prompt = model.config.vision_config, prompt.clamp(max=tiny.VOCAB_SIZE - shrunk.NUM_SPECIAL - 1)
    prompt[:, 60 : 60 + (4 // vision.spatial_merge_size) ** 2] = model.config.image_token_id
    image = {
        "pixel_values": torch.rand(16, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (prompt == model.config.image_token_id).int(),
    }
    with chunked(model, "snapkv") as cache, pytest.raises(ModelError, match="deepstack_visual_embeds cannot be told"):
        model(prompt, past_key_values=cache, **image)


@pytest.mark.parametrize("pass_", [1, 2, 5, 6])
def test_an_interrupted_pass_is_noticed(pass_: int) -> None:
    """Of a chunk, or of the prompt's end, which is read behind every chunk but the last."""
    model, prompt, passes = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT), []

    def interrupt(*_: object) -> None:
        passes.append(None)
        if len(passes) == pass_:
            raise KeyboardInterrupt

    with chunked(model, "snapkv") as cache:
        expected = tiny.read(model, cache, prompt, [NUM_PROMPT])
        cache.reset()
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.read(model, cache, prompt, [NUM_PROMPT])
        handle.remove()
        with pytest.raises(CacheStateError, match=r"interrupted: reset\(\)"):
            tiny.read(model, cache, prompt, [NUM_PROMPT - cache.get_seq_length()])
        cache.reset()
        assert torch.equal(tiny.read(model, cache, prompt, [NUM_PROMPT]), expected)


def test_a_prompt_of_a_chunk_is_cut_at_its_end_alone() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(CHUNK + 7)  # its end lies within the window
    found = []
    for context in (chunked(model, "snapkv"), whole(model, "snapkv")):
        with context as cache:
            tiny.read(model, cache, prompt, [prompt.shape[1]])
            found.append(tiny.kept_tokens(cache.compressed_layers[0]))
    assert found[0] == found[1]


@pytest.mark.stores(reason="the numbers are those of the plan")
@pytest.mark.parametrize("budget", [BUDGET, 0.35])
@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv"])
def test_the_cache_tells_how_it_was_cut(method: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    held, cuts, cut_chunk = list[int](), list[int](), CompressedLayer.cut_chunk

    def noting(layer: CompressedLayer, window: QueryWindow) -> None:
        held.append(layer.num_retained)
        cut_chunk(layer, window)
        cuts.append(layer.num_retained)

    monkeypatch.setattr(CompressedLayer, "cut_chunk", noting)
    model = tiny.tiny_model("llama")
    with chunked(model, method, budget) as cache:
        assert cache.chunk_stats is None
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    told = cache.chunk_stats
    assert told is not None
    assert (told.budget, told.tokens, told.num_cuts * 4) == (KEPT, CHUNK, len(cuts))
    in_the_end = cuts[-1] + NUM_PROMPT - (NUM_PROMPT - NUM_PROMPT % CHUNK)
    assert (told.num_kept, told.most_held) == (max(cuts), max(*held, in_the_end))
    assert (told.note is None) == (told.num_kept == KEPT) == (budget == BUDGET)


def test_a_cut_that_is_never_made_is_told_of() -> None:
    model = tiny.tiny_model("llama")
    with chunked(model, "snapkv", chunk_budget=NUM_PROMPT) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    assert cache.chunk_stats is not None
    assert cache.chunk_stats.num_cuts == 0
    assert str(cache.chunk_stats.note).startswith(f"chunk_budget={NUM_PROMPT} had no effect: ")
    with compresskv.compressing(model, "snapkv", BUDGET) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    assert cache.chunk_stats is None


def test_sinks_and_the_latest_tokens_outlast_all_cuts() -> None:
    model = tiny.tiny_model("llama")
    with chunked(model, "streaming_llm", 10) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
        assert tiny.kept_tokens(cache.compressed_layers[0])[0][0] == [0, 1, 2, 3, *range(134, 140)]
        cache.reset()
        tiny.read(model, cache, tiny.random_tokens(70), [70])  # the next prompt has cuts of its own
        assert tiny.kept_tokens(cache.compressed_layers[0])[0][0] == [0, 1, 2, 3, *range(64, 70)]


def test_what_cannot_be_cut_in_chunks_is_refused_by_name() -> None:
    model = tiny.tiny_model("llama")
    for method in set(registry.methods()) - set(CUTTING) - {*tiny.REPLAYING_METHODS, "full"}:
        with pytest.raises(ConfigError, match=f"chunk_budget=.*'{method}' must see all"):
            chunked(model, method)
    with pytest.raises(ConfigError, match=r"chunk_budget=.*'snapkv\[lookahead=4\]' looks ahead: leave out lookahead$"):
        chunked(model, "snapkv", lookahead=4)
    with pytest.raises(ConfigError, match="chunk_tokens=4 must be at least 8"):
        chunked(model, "snapkv", chunk_tokens=4)
    for budget in (KEPT + 1, [1, 1, KEPT + 1, 1]):
        with pytest.raises(ConfigError, match=f"chunk_budget={KEPT} is below budget={KEPT + 1}: "):
            chunked(model, "snapkv", budget)
    with pytest.raises(ConfigError, match=r"chunk_budget=40 .* 'full' keeps all of it"):
        chunked(model, "full")
    with pytest.raises(ConfigError, match="chunk_budget=0"):
        chunked(model, "snapkv", chunk_budget=0)
    rows, mask = tiny.left_padded([tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(80)])
    with chunked(model, "snapkv") as cache, pytest.raises(PromptError, match="padded"):
        tiny.generate(model, rows, cache, attention_mask=mask)


def test_reading_beyond_a_cut_is_found() -> None:
    """A decoder that is called past our hook reads all at once."""
    model = tiny.tiny_model("llama")
    with chunked(model, "snapkv") as cache, pytest.raises(CacheStateError, match="beyond a cut"):
        type(model.model).forward(model.model, input_ids=tiny.random_tokens(NUM_PROMPT), past_key_values=cache)


def test_what_cannot_be_told_of_a_chunk_is_refused() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    causal = torch.ones(1, 1, NUM_PROMPT, NUM_PROMPT, dtype=torch.bool).tril()
    for name, value in (("attention_mask", causal), ("attention_mask", {"full_attention": None})):
        with chunked(model, "snapkv") as cache, pytest.raises(ModelError, match="attention_mask cannot be told"):
            model(input_ids=prompt, past_key_values=cache, **{name: value})
    with chunked(model, "snapkv") as cache, pytest.raises(ModelError, match="no hidden states"):
        model(input_ids=prompt, past_key_values=cache, output_hidden_states=True)
