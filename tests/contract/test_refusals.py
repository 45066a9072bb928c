"""What cannot work is refused with one line that says so, and leaves the model as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import compresskv
import tiny
from compresskv import CacheStateError, CompressKVError, ConfigError, ModelError, PromptError


@contextmanager
def refused(error: type[CompressKVError], match: str) -> Iterator[None]:
    with pytest.raises(error, match=match) as raised:
        yield
    assert "\n" not in str(raised.value)


def enter(model: PreTrainedModel, method: str = "snapkv", budget: Any = 20, **options: Any) -> None:
    with compresskv.compressing(model, method, budget, **options):
        pytest.fail("the context was entered")


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("mistral_sliding", "no full-attention layer"),
        ("mamba", "does not use transformers' attention interface|uses a cache of its own"),
        ("bloom", "does not use transformers' attention interface"),
    ],
)
@pytest.mark.parametrize("method", ["snapkv", "compresskv"])
def test_models_whose_cache_cannot_be_compressed_are_refused(family: str, match: str, method: str) -> None:
    model = tiny.tiny_model(family, "eager")
    if method == "compresskv" and family == "mistral_sliding":
        match = "no profile|no full-attention layer"
    with refused(CompressKVError, match):
        enter(model, method)
    if method == "snapkv":
        with refused(ModelError, match):
            enter(model)


@pytest.mark.parametrize("method", ["snapkv", "compresskv"])
def test_encoder_decoder_models_are_refused(method: str) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with refused(ModelError, "encoder-decoder"):
        enter(T5ForConditionalGeneration(config), method)


@pytest.mark.parametrize("budget", [[5], [5] * 5, 0, -3, 1.5, 0.0, True, "many", [], [5, 5, 5, 0]])
def test_budgets_that_cannot_work_are_refused(budget: Any) -> None:
    with refused(ConfigError, "budget"):
        enter(tiny.tiny_model("llama"), budget=budget)


PADDED_WRONGLY = {
    "right": [[1] * 30, [1] * 20 + [0] * 10],
    "inside": [[1] * 30, [1] * 10 + [0] * 10 + [1] * 10],
    "nothing_else": [[1] * 30, [0] * 30],
}


@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("where", PADDED_WRONGLY)
def test_padding_that_is_not_left_is_refused_and_reset_makes_the_cache_good_again(
    family: str, attn_implementation: str, where: str
) -> None:
    # With padding on the right the "last tokens" of a row are padding, and they would choose what is kept.
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(30, batch_size=2)
    with compresskv.compressing(model, "snapkv", 12) as cache:
        with refused(PromptError, "pad on the left"):
            tiny.generate(model, prompt, cache, attention_mask=torch.tensor(PADDED_WRONGLY[where]))
        cache.reset()
        tokens = tiny.generate(model, prompt, cache)
    with compresskv.compressing(model, "snapkv", 12) as fresh:
        assert tokens.tolist() == tiny.generate(model, prompt, fresh).tolist()


def test_a_cache_whose_keys_the_model_does_not_attend_to_is_refused() -> None:
    # A model that changes the keys between cache and attention would be scored on other keys than it uses.
    model = tiny.tiny_model("llama")
    with compresskv.compressing(model, "snapkv", 12) as cache:
        layer, states = cache.compressed_layers[0], torch.zeros(1, 2, 3, 8)
        layer.update(states, states)
        with refused(ModelError, "does not use the keys that the cache returns"):
            layer.update(states, states)


@pytest.mark.parametrize("where", ["between_layers", "before_attention", "before_the_last_attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_whose_reading_was_interrupted_says_so_and_is_good_after_reset(family: str, where: str) -> None:
    model, prompt = tiny.build_model(family), tiny.random_tokens(30)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with compresskv.compressing(model, "snapkv", 12) as cache:
        if where == "between_layers":
            handle = model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                tiny.generate(model, prompt, cache)
            handle.remove()
        else:
            last = -1 if where == "before_the_last_attention" else 0
            layer, update = cache.compressed_layers[last], cache.compressed_layers[last].update

            def updated(*args: Any, **kwargs: Any) -> Any:
                update(*args, **kwargs)
                raise KeyboardInterrupt

            layer.update = updated  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                tiny.read(model, cache, prompt, [30])
            layer.update = update  # type: ignore[method-assign]
        with refused(CacheStateError, r"interrupted.* reset\(\)"):
            tiny.read(model, cache, torch.cat([prompt, prompt], dim=1), [1])
        cache.reset()
        tokens = tiny.generate(model, prompt, cache)
    with compresskv.compressing(model, "snapkv", 12) as fresh:
        assert tokens.tolist() == tiny.generate(model, prompt, fresh).tolist()


@pytest.mark.parametrize("num_tokens", [30, 60, 69, 70, 71, 90])
def test_a_second_prompt_on_a_used_cache_is_refused(num_tokens: int) -> None:
    """Of which `generate` would leave out as many tokens as the cache has seen: 69."""
    model = tiny.tiny_model("llama")
    with compresskv.compressing(model, "snapkv", 12) as cache:
        tiny.generate(model, tiny.random_tokens(60), cache)
        if num_tokens < 70 and Version(transformers.__version__) < Version("5.6"):
            pytest.skip("these transformers raise an error of their own")
        with refused(CacheStateError, r"reset\(\) the cache before another prompt"):
            tiny.generate(model, tiny.random_tokens(num_tokens, seed=1), cache)


def test_more_prompt_tokens_than_the_prompt_has_are_refused_at_the_first_generated_one() -> None:
    model = tiny.tiny_model("llama")
    ended = refused(CacheStateError, "prompt_tokens=100, but the prompt ended after 60 tokens")
    with ended, compresskv.compressing(model, "snapkv", 12, prompt_tokens=100) as cache:
        tiny.generate(model, tiny.random_tokens(60), cache)


def test_an_unfinished_prompt_is_told_of() -> None:
    model = tiny.tiny_model("llama")
    told = pytest.warns(UserWarning, match="prompt_tokens=100, but 60 tokens were read: nothing was evicted")
    with told as warned, compresskv.compressing(model, "snapkv", 12, prompt_tokens=100) as cache:
        tiny.read(model, cache, tiny.random_tokens(60), [40, 20])
    assert [one.filename for one in warned] == [__file__]
    with compresskv.compressing(model, "snapkv", 12, prompt_tokens=100):
        pass


def test_training_with_gradient_checkpointing_is_refused() -> None:
    model = tiny.build_model("llama")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with refused(ModelError, "gradient checkpointing, which drops the cache"):
        enter(model.train())


def test_a_model_that_drops_the_cache_inside_is_told_of() -> None:
    model = tiny.build_model("llama")
    with compresskv.compressing(model, "snapkv", 12) as cache:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()
        with refused(ModelError, "read without the cache that it was given"):
            model(tiny.random_tokens(60), past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_an_attention_implementation_that_is_set_inside_stays_and_the_cache_is_refused() -> None:
    model = tiny.build_model("llama")
    with compresskv.compressing(model, "snapkv", 12) as cache:
        model.set_attn_implementation("eager")
        with refused(CacheStateError, "the attention implementation that the model had there"):
            tiny.generate(model, tiny.random_tokens(60), cache)
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_the_model_that_is_made_inside_is_a_model_like_any_other() -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(60)
    with compresskv.compressing(model, "snapkv", 12) as cache:
        expected = tiny.generate(model, prompt, cache).tolist()
        twin = copy.deepcopy(model)
    assert tiny.generate(twin, prompt).tolist() == tiny.generate(model, prompt).tolist()
    with compresskv.compressing(twin, "snapkv", 12) as cache:
        assert tiny.generate(twin, prompt, cache).tolist() == expected
    assert twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_generate_may_read_the_prompt_in_chunks_of_which_nobody_is_told(method: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(60)
    plain = [tiny.generate(model, prompt, **options).tolist() for options in ({}, {"prefill_chunk_size": 16})]
    if plain[0] != plain[1]:
        pytest.skip("these transformers read chunks wrongly")
    kept, tokens = [], []
    for options in ({}, {"prefill_chunk_size": 16}):
        with compresskv.compressing(model, method, 12) as cache:
            tokens.append(tiny.generate(model, prompt, cache, **options).tolist())
        kept.append(tiny.kept_tokens(cache.compressed_layers[0]))
    assert tokens[0] == tokens[1]
    assert kept[0] == kept[1]


def test_an_empty_layer_has_nothing_stored() -> None:
    with compresskv.compressing(tiny.tiny_model("llama"), "snapkv", 12) as cache:
        assert cache.compressed_layers[0].num_retained == 0
        with refused(CacheStateError, "layer 0 of the cache is empty"):
            cache.compressed_layers[0].stored()


def test_a_profile_for_a_method_that_takes_none() -> None:
    model = tiny.tiny_model("llama")
    with refused(ConfigError, "'snapkv' takes no profile"):
        compresskv.compressing(model, "snapkv", 20, profile=tiny.random_profile(model))
    with refused(ConfigError, "'snapkv' takes no profile"):
        compresskv.compressing(
            model, "snapkv", 20, profile=tiny.random_profile(model), decode_budget=20, decode_method="rkv"
        )
