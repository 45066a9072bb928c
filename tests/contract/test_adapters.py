"""Models that peft has given adapters."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv import ModelError

# peft's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

BUDGET = 24
PROMPT = tiny.random_tokens(60)


def adapted(config: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.build_model("llama"), config).eval().requires_grad_(False)


def lora() -> Any:
    return adapted(_lora_config())


def _lora_config() -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def answer(model: Any, cache: Any = None) -> Tensor:
    """(tokens, vocab) of greedy decoding, through the wrapper as its users call it."""
    output = model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits)


def compressed(model: Any, method: str, compile: str = "never") -> Tensor:
    with compresskv.compressing(model, method, BUDGET, compile=compile) as cache:
        logits = answer(model, cache)
        assert all((layer.mean_retained == BUDGET) == (method != "full") for layer in cache.compressed_layers)
        assert cache.not_compiled is None
    return logits


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
def test_lora_equals_the_same_weights_merged(method: str) -> None:
    model = lora()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(compressed(model, method), compressed(merged, method), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
def test_another_adapter_is_seen_by_a_compiled_step() -> None:
    model = lora()
    model.add_adapter("other", _lora_config())
    found = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        model.requires_grad_(False)
        found.append(compressed(model, "snapkv", "always"))
        torch.testing.assert_close(found[-1], compressed(model, "snapkv"), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(
            compressed(model, "snapkv", "always"), compressed(model, "snapkv"), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "IA3Config"])
def test_learned_prompts_are_part_of_the_prompt(kind: str) -> None:
    virtual = {} if kind == "IA3Config" else {"num_virtual_tokens": 5}
    model = adapted(getattr(peft, kind)(task_type="CAUSAL_LM", **virtual))
    torch.testing.assert_close(compressed(model, "full"), answer(model), rtol=1e-4, atol=1e-4)
    with compresskv.compressing(model, "snapkv", BUDGET) as cache:
        answer(model, cache)
    assert {layer.num_prompt_tokens for layer in cache.compressed_layers} == {60 + virtual.get("num_virtual_tokens", 0)}


def test_gradient_checkpointing_is_refused() -> None:
    model = lora().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match=r"gradient checkpointing.*model\.eval"):
        compressed(model, "snapkv")


def test_learned_keys_are_refused() -> None:
    model = adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ModelError, match="its PREFIX_TUNING adapter keeps learned keys") as refused:
        compressed(model, "snapkv")
    assert "\n" not in str(refused.value)
