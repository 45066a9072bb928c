"""Tensor parallelism on two CPU processes: each scores its own heads, and both keep what one process would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import make_random_model
from ranks_process import BUDGET
from transformers import LlamaForCausalLM

import compresskv
from compresskv.methods.registry import parse_methods
from compresskv.models.decoding import prefill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores: vLLM binds each rank to its own"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs: each rank has its own"
    ),
]


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    """Random weights: 4 query heads, 2 KV heads. Its profile lies beside it."""
    return make_random_model(tmp_path)


def own_positions(model: LlamaForCausalLM, folder: Path, method: str, prompt: list[int]) -> list[int]:
    (chosen,) = parse_methods("method", method).values()
    with compresskv.compressing(model, chosen, BUDGET, profile=folder / "profile.json") as cache:
        prefill(model, torch.tensor([prompt]), cache)
        positions: list[int] = cache.compressed_layers[0].positions[0, 0].tolist()
    return positions


@pytest.mark.parametrize("method", ["vote", "vote[local_weight=0,num_heads=1]"])  # of one head, a rank knows nothing
def test_two_ranks_keep_what_one_would(model: LlamaForCausalLM, method: str, tmp_path: Path) -> None:
    prompts = [torch.randint(0, 500, (length,)).tolist() for length in (700, 333)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    expected = [own_positions(model, tmp_path, method, prompt) for prompt in prompts]
    two, one = (in_a_process(tmp_path, method, num_ranks) for num_ranks in (2, 1))
    assert two["positions"] == [expected, expected]
    assert one["positions"] == [expected]
    assert two["answers"] == one["answers"]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_rank_cannot_score_both_keep_the_same(model: LlamaForCausalLM, failing: int, tmp_path: Path) -> None:
    """Neither waits for the other."""
    prompt = torch.randint(0, 500, (333,)).tolist()
    (tmp_path / "prompts.json").write_text(json.dumps([prompt]), encoding="utf-8")
    answer = in_a_process(tmp_path, "vote", 2, failing)
    assert answer["positions"] == [[[*range(4), *range(333 - BUDGET + 4, 333)]]] * 2
    assert len(answer["answers"][0]) == 30


def in_a_process(folder: Path, method: str, num_ranks: int, failing: int = -1) -> dict[str, Any]:
    """See ranks_process.py: vLLM reads how to bind its ranks to cores once a process."""
    script = Path(__file__).with_name("ranks_process.py")
    command = [sys.executable, str(script), str(folder), method, str(num_ranks), str(failing)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer
