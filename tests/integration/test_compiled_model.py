"""Real weights, decoded by a compiled step."""

import pytest
import torch

import compresskv
from compresskv.calibration.haystack import read_haystack

NUM_LAYERS = 2  # of 30, which would be compiled for minutes


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_model", "stored_packages")
def test_the_same_tokens_as_without() -> None:
    model, tokenizer = compresskv.load(dtype="float32")
    model.model.layers = model.model.layers[:NUM_LAYERS]
    model.config.num_hidden_layers = NUM_LAYERS
    prompt = tokenizer(" ".join(read_haystack()), return_tensors="pt", verbose=False).input_ids[:, :600]
    answers = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, "adakv", budget=96, compile=compile) as cache:
            answers.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=cache,
                    max_new_tokens=40,
                    do_sample=False,
                ).tolist()
            )
    assert (cache.num_compiled_steps, cache.not_compiled) == (len(answers[0][0]) - 601, None)
    assert answers[0] == answers[1]
