"""Needles asked through the OpenAI API, of a server with the plugin and of one without."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import httpx
from transformers import PreTrainedTokenizerBase

from benchmarks.serving.environment import server_environment
from compresskv.errors import ModelError
from compresskv.evaluation.tasks.base import TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.registry import create_task

_START_S = 300
_ANSWER_S = 300


@contextmanager
def server(
    model: str, *, compressed: bool, max_model_len: int, dtype: str, kv_cache_dtype: str, prefix_caching: bool
) -> Iterator[str]:
    """A vLLM server; yields its address.

    Raises:
        ModelError: it does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "model", "--enforce-eager", "--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype]
    command += ["--max-model-len", str(max_model_len), "--kv-cache-memory-bytes", str(1 << 30)]
    command.append("--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching")
    environment = server_environment(os.environ, compressed=compressed)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(process, address, log)
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for(process: subprocess.Popen[bytes], address: str, log: IO[str]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    log.seek(0)
    last = [line.strip() for line in log if line.strip()][-1:]
    raise ModelError(f"vLLM's server did not start (exit code {process.poll()}): {''.join(last)}")


def needles(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], depths: Sequence[float], number: int
) -> list[Example]:
    """A plain fact in a long text, at each length and depth as many as `number`."""
    settings = TaskSettings(
        tokenizer, lengths=tuple(lengths), depths=tuple(depths), subsets=("single",), limit=number, seed=0
    )
    return create_task("needle").examples(settings)


def ask(address: str, example: Example, budget: int | None) -> dict[str, Any]:
    """A server's answer, and whether it is right.

    Args:
        budget: None asks a server without the plugin.
    """
    answer = _answer(address, example.prompt, example.max_new_tokens, budget)
    return {"answer": answer, "answered": create_task("needle").score(example, answer)["score"]}


def _answer(address: str, prompt: str, max_tokens: int, budget: int | None) -> str:
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body["max_tokens"] = max_tokens
    if budget is not None:
        body["vllm_xargs"] = {"compresskv": budget}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=_ANSWER_S)
    response.raise_for_status()
    answer: str = response.json()["choices"][0]["message"]["content"] or ""
    return answer
