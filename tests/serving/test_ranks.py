"""Tensor parallelism on two CPU processes: each scores its own heads, and both keep what one process would."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import engine_options, keep_alive
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

import compresskv
from compresskv.decoding import prefill
from compresskv.profiles.checkpoint import checkpoint_fingerprint
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile
from compresskv.registry import parse_methods

BUDGET = 60
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


def start(folder: Path, method: str, num_ranks: int) -> LLM:
    settings = {"budget": BUDGET, "method": method, "profile": str(folder / "profile.json")}
    options = engine_options(
        settings,
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=50_000_000,
        tensor_parallel_size=num_ranks,
    )
    llm = LLM(**options)
    keep_alive(llm)
    return llm


def note_positions(worker: Any) -> None:
    """Runs in each rank's process."""
    compaction = worker.model_runner.compaction
    evict, compaction.noted = compaction.evict, []

    def noting(*args: Any) -> torch.Tensor:
        positions: torch.Tensor = evict(*args)
        compaction.noted.append(positions.tolist())
        return positions

    compaction.evict = noting


def noted_positions(worker: Any) -> list[list[int]]:
    """Runs in each rank's process."""
    noted: list[list[int]] = worker.model_runner.compaction.noted
    return noted


def own_positions(model: LlamaForCausalLM, folder: Path, method: str, prompt: list[int]) -> list[int]:
    (chosen,) = parse_methods("method", method).values()
    with compresskv.compressing(model, chosen, BUDGET, profile=folder / "profile.json") as cache:
        prefill(model, torch.tensor([prompt]), cache)
        positions: list[int] = cache.compressed_layers[0].positions[0, 0].tolist()
    return positions


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores: vLLM binds each rank to its own")
@pytest.mark.parametrize("method", ["vote", "vote[local_weight=0,num_heads=1]"])  # of one head, a rank knows nothing
def test_two_ranks_keep_what_one_would(
    model: LlamaForCausalLM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of the functions above, into the ranks
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = [torch.randint(0, 500, (length,)).tolist() for length in (700, 333)]
    expected = [own_positions(model, tmp_path, method, prompt) for prompt in prompts]
    answers = []
    for num_ranks in (2, 1):
        llm = start(tmp_path, method, num_ranks)
        rpc: Callable[..., Any] = llm.collective_rpc
        rpc(note_positions)
        sampling = SamplingParams(temperature=0, max_tokens=30, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
        assert rpc(noted_positions) == [expected] * num_ranks
    assert answers[0] == answers[1]
