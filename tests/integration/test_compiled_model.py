"""The embedded model, decoded by a compiled step."""

from pathlib import Path

import pytest
import torch

import compresskv
from compresskv.calibration.haystack import read_haystack
from compresskv.compiled import decoding


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_model")
def test_the_same_tokens_as_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = compresskv.load(dtype="float32")
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path))
    decoding._loaded.clear()
    prompt = tokenizer(" ".join(read_haystack()), return_tensors="pt", verbose=False).input_ids[:, :600]
    answers = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, budget=96, compile=compile) as cache:
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
