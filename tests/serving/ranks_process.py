"""A program: vLLM with tensor parallelism reads prompts and tells what each rank kept. Run by test_ranks.py.

Usage: ranks_process.py FOLDER METHOD NUM_RANKS FAILING, where FOLDER holds a model, profile.json and prompts.json, and
FAILING is the rank that cannot score, or -1.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

BUDGET = 60


def note_positions(worker: Any, failing: int) -> None:
    """Runs in each rank's process."""
    import compresskv.serving.compaction as module

    def raising(*_arguments: Any) -> None:
        raise RuntimeError("this rank fails")

    compaction = worker.model_runner.compaction
    if worker.rank == failing:
        module.observe = raising
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


def main(folder: Path, method: str, num_ranks: int, failing: int) -> None:
    """Write answer.json into the folder."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of the functions above, into the ranks
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(num_ranks)))
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=50_000_000,
        enable_prefix_caching=False,
        enforce_eager=True,
        tensor_parallel_size=num_ranks,
        additional_config={"compresskv": {"budget": BUDGET, "method": method, "profile": str(folder / "profile.json")}},
    )
    llm.collective_rpc(note_positions, args=(failing,))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    sampling = SamplingParams(temperature=0, max_tokens=30, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answer = {
        "positions": llm.collective_rpc(noted_positions),
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
    }
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
