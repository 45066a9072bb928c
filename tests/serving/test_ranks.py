"""Tensor parallelism on two CPU processes: each scores its own heads, and both keep what one process would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_process import BUDGET
from transformers import LlamaConfig, LlamaForCausalLM

import compresskv
from compresskv.methods.registry import parse_methods
from compresskv.models.checkpoint import checkpoint_fingerprint
from compresskv.models.decoding import prefill
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile

NUM_LAYERS, NUM_HEADS = 3, 4


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    """Random weights: 4 query heads, 2 KV heads. Its profile lies beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=500,
        max_position_embeddings=2048,
    )
    network = LlamaForCausalLM(config).eval()
    network.save_pretrained(tmp_path)
    even = (1 / NUM_LAYERS,) * NUM_LAYERS
    scores = tuple(tuple(row) for row in torch.rand(NUM_LAYERS, NUM_HEADS).tolist())
    layers = tuple(range(NUM_LAYERS))
    profile = Profile("tiny", checkpoint_fingerprint(tmp_path), layers, scores, None, 1, {"even": even}, even)
    write_profile(profile, tmp_path / "profile.json")
    return network


def own_positions(model: LlamaForCausalLM, folder: Path, method: str, prompt: list[int]) -> list[int]:
    (chosen,) = parse_methods("method", method).values()
    with compresskv.compressing(model, chosen, BUDGET, profile=folder / "profile.json") as cache:
        prefill(model, torch.tensor([prompt]), cache)
        positions: list[int] = cache.compressed_layers[0].positions[0, 0].tolist()
    return positions


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores: vLLM binds each rank to its own")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs: each rank has its own"
)
@pytest.mark.parametrize("method", ["vote", "vote[local_weight=0,num_heads=1]"])  # of one head, a rank knows nothing
def test_two_ranks_keep_what_one_would(model: LlamaForCausalLM, method: str, tmp_path: Path) -> None:
    prompts = [torch.randint(0, 500, (length,)).tolist() for length in (700, 333)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    expected = [own_positions(model, tmp_path, method, prompt) for prompt in prompts]
    two, one = (in_a_process(tmp_path, method, num_ranks) for num_ranks in (2, 1))
    assert two["positions"] == [expected, expected]
    assert one["positions"] == [expected]
    assert two["answers"] == one["answers"]


def in_a_process(folder: Path, method: str, num_ranks: int) -> dict[str, Any]:
    """See ranks_process.py: vLLM reads how to bind its ranks to cores once a process."""
    script = Path(__file__).with_name("ranks_process.py")
    command = [sys.executable, str(script), str(folder), method, str(num_ranks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer
