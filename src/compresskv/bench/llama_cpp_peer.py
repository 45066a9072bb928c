"""Measure llama.cpp with its full cache: `python -m compresskv.bench.llama_cpp_peer --request FILE`.

It runs in the environment that `scripts/environment-llama-cpp` makes. Each row is one line of JSON on stdout, and so is
progress. Weights are read as their GGUF file holds them: the embedded model's are 4-bit ones.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from compresskv.bench.engine_peer import measure_engine, model_path, num_threads
from compresskv.bench.peer_request import BenchRequest
from compresskv.embedded import ensure_gguf
from compresskv.errors import ConfigError
from compresskv.evaluation.peer_answers import Write, answer_request


def measure(request: BenchRequest, write: Write) -> None:
    """Read each prompt and generate from it, in rounds.

    Raises:
        ConfigError: the model is no GGUF file, or llama.cpp does not know it.
    """
    import llama_cpp
    import numpy as np

    path = model_path(request, "llama.cpp", ensure_gguf)
    if not path.endswith(".gguf"):
        raise ConfigError(f"--peers llama.cpp reads GGUF files, and --model {path!r} is none")
    try:
        model = llama_cpp.Llama(
            path,
            n_ctx=request.to_plan().most_tokens,
            n_threads=num_threads(),
            n_threads_batch=num_threads(),
            flash_attn=True,  # the faster of both
            verbose=False,
        )
    except ValueError as error:
        raise ConfigError(f"--peers llama.cpp cannot load {path!r}: {error}") from error

    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        model.reset()
        model.eval(token_ids)
        for left in reversed(range(num_new)):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())
            yield token
            if left:
                model.eval([token])

    bits = Path(path).suffixes[0].removeprefix(".") if len(Path(path).suffixes) > 1 else "GGUF"
    versions = {"llama-cpp-python": llama_cpp.__version__}
    measure_engine(request, "llama.cpp", f"llama.cpp ({bits}), full cache", versions, generate, write)


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Measure llama.cpp; one JSON line for each row.", "BenchRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    measure(BenchRequest.read(request), write)


if __name__ == "__main__":
    sys.exit(main())
