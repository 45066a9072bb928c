"""Measure llama.cpp with its full cache: `python -m compresskv.bench.llama_cpp_peer --request FILE`.

It runs in the environment that `scripts/environment-llama-cpp` makes. Each row is one line of JSON on stdout, and so is
progress. Weights are read as their GGUF file holds them: the embedded model's are 4-bit ones.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from compresskv.bench.engine_peer import measure_engine, model_path
from compresskv.bench.peer_request import BenchRequest
from compresskv.errors import ConfigError
from compresskv.models.embedded import ensure_gguf
from compresskv.peers.answers import Write, answer_request


def measure(request: BenchRequest, write: Write) -> None:
    """Read each prompt and generate from it, in rounds.

    Raises:
        ConfigError: the model is on a GPU, or llama.cpp does not know it.
    """
    import llama_cpp
    import numpy as np

    if request.device != "cpu":
        raise ConfigError(f"llama.cpp is measured on CPUs only, and the model is on {request.device}")
    path = model_path(request, ensure_gguf)
    try:
        model = llama_cpp.Llama(
            path,
            n_ctx=request.to_plan().most_tokens,
            n_threads=request.num_threads,
            n_threads_batch=request.num_threads,
            flash_attn=True,  # the faster of both
            verbose=False,
        )
    except ValueError as error:
        raise ConfigError(f"llama.cpp cannot load {path!r}: {error}") from error

    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        model.reset()
        model.eval(token_ids)
        for left in reversed(range(num_new)):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())
            yield token
            if left:
                model.eval([token])

    versions = {"llama-cpp-python": llama_cpp.__version__}
    label = f"llama.cpp ({weights_name(path)}), full cache"
    measure_engine(request, "llama.cpp", label, versions, generate, write)


def weights_name(path: str) -> str:
    """What a GGUF file's name says about its weights, such as 'Q4_K_M'; 'GGUF' where it says nothing."""
    found = re.search(r"(I?Q\d\w*|BF16|F16|F32)(?=\.gguf$)", path, re.IGNORECASE)
    return found[0] if found else "GGUF"


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Measure llama.cpp; one JSON line for each row.", "BenchRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    measure(BenchRequest.read(request), write)


if __name__ == "__main__":
    sys.exit(main())
