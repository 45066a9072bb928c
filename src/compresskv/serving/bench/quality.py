"""Needles asked through the OpenAI API, of a server with the plugin and of one without."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from compresskv.errors import ModelError
from compresskv.evaluation.task import TaskSettings, create_task

_START_S = 300
_ANSWER_S = 300


@contextmanager
def server(model: str, *, compressed: bool, max_model_len: int, dtype: str) -> Iterator[str]:
    """A vLLM server; yields its address.

    Raises:
        ModelError: it does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "model", "--no-enable-prefix-caching", "--enforce-eager", "--dtype", dtype]
    command += ["--max-model-len", str(max_model_len), "--kv-cache-memory-bytes", str(1 << 30)]
    environment = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR", COMPRESSKV_BUDGET="1.0" if compressed else "")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(process, address)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise ModelError(f"vLLM's server did not start (exit code {process.poll()})")


def run_quality(
    address: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], budgets: Sequence[int | None], limit: int
) -> list[dict[str, Any]]:
    """The share of needles answered at each length and budget.

    Args:
        budgets: None asks a server without the plugin.
        limit: needles for each length and depth.
    """
    task = create_task("needle")
    settings = TaskSettings(tokenizer, lengths=tuple(lengths), subsets=("single",), limit=limit)
    examples = task.examples(settings)
    rows = []
    with httpx.Client(base_url=address, timeout=_ANSWER_S) as client:
        for budget in budgets:
            for length in lengths:
                own = [example for example in examples if example.meta["length"] == length]
                scores = [
                    task.score(example, _answer(client, example.prompt, example.max_new_tokens, budget))["score"]
                    for example in own
                ]
                row = {"kind": "quality", "length": length, "budget": budget}
                rows.append(row | {"num_needles": len(own), "answered": sum(scores) / len(own)})
    return rows


def _answer(client: httpx.Client, prompt: str, max_tokens: int, budget: int | None) -> str:
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body["max_tokens"] = max_tokens
    if budget is not None:
        body["vllm_xargs"] = {"compresskv": budget}
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    answer: str = response.json()["choices"][0]["message"]["content"] or ""
    return answer
