"""`compresskv serve`: the OpenAI API, streaming, a request's own budget, the metrics endpoint, and Ctrl-C."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine import SHIPS_LOG

pytestmark = pytest.mark.slow

_START_S = 240


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def counters(self) -> dict[str, float]:
        """Ours, from the metrics endpoint."""
        lines = self.client.get("/metrics").text.splitlines()
        pairs = (line.split() for line in lines if line.startswith("compresskv:"))
        return {name.removeprefix("compresskv:").removesuffix("_total"): float(value) for name, value in pairs}

    def told_cuts(self) -> list[int]:
        """Prompts cut so far, in each line of ours in the log."""
        pattern = r"(\d+) prompts cut, \d+ tokens evicted, \d+ blocks freed, [\d.]+ s of scoring, "
        return [int(number) for number in re.findall(pattern, self.log.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> Iterator[Server]:
    """A server of its own processes, as users start it: with vLLM's defaults, prefix caching among them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "compresskv", "serve", "smollm2-135m", "--budget", "120", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "4096", "--enforce-eager", "--max-num-seqs", "16"]
    command += ["--dtype", "float32"]  # quick on every processor
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        process = subprocess.Popen(command, env=clean_environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _START_S
            while not _is_up(client):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.5)
            yield Server(process, client, log)
        finally:
            process.send_signal(signal.SIGINT)  # a kill would leave its engine behind
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def request(**more: Any) -> dict[str, Any]:
    """A question about some 1,500 tokens."""
    text = SHIPS_LOG.read_text(encoding="utf-8")[:6000]
    message = {"role": "user", "content": f"{text}\n\nWhat did they eat?"}
    return {"model": "smollm2-135m", "messages": [message], "max_tokens": 20, "temperature": 0, **more}


def test_answers_are_streamed_and_counted(server: Server) -> None:
    before = server.counters()
    pieces = []
    with server.client.stream("POST", "/v1/chat/completions", json=request(stream=True)) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "")
    assert len(pieces) > 10
    whole = server.client.post("/v1/chat/completions", json=request()).json()  # most of its prompt is found
    assert whole["choices"][0]["message"]["content"] == "".join(pieces)
    after = server.counters()
    counters = {name: value - before.get(name, 0) for name, value in after.items()}
    assert counters["evicted_prompts"] == 2
    assert counters["evicted_tokens"] == 2 * (whole["usage"]["prompt_tokens"] - 120)
    assert counters["freed_blocks"] > 10
    assert counters["scoring_seconds"] > 0
    assert counters["compaction_seconds"] > 0


def test_the_log_tells_what_was_done(server: Server) -> None:
    """The first cut at once, and the last when nothing is left to do."""
    assert server.client.post("/v1/chat/completions", json=request(max_tokens=1)).status_code == 200
    num_cut = server.counters()["evicted_prompts"]
    deadline = time.monotonic() + 20  # the answer may be here before the line is
    while (told := server.told_cuts())[-1:] != [num_cut]:
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    assert told[0] == 1


def test_a_request_has_its_own_budget(server: Server) -> None:
    before = server.counters()
    response = server.client.post("/v1/chat/completions", json=request(vllm_xargs={"compresskv": "off"}))
    assert response.status_code == 200
    assert server.counters() == before
    response = server.client.post("/v1/chat/completions", json=request(vllm_xargs={"compresskv": 64}))
    num_prompt = response.json()["usage"]["prompt_tokens"]
    assert server.counters()["evicted_tokens"] == before.get("evicted_tokens", 0) + num_prompt - 64


def test_a_bad_budget_is_the_requests_own_fault(server: Server) -> None:
    response = server.client.post("/v1/chat/completions", json=request(vllm_xargs={"compresskv": "much"}))
    assert response.status_code == 400
    assert "'much' is no budget" in response.json()["error"]["message"]
    response = server.client.post("/v1/chat/completions", json=request(vllm_xargs={"compresskv": 2**70}))
    assert response.status_code == 400
    assert server.client.post("/v1/chat/completions", json=request(max_tokens=1)).status_code == 200


def test_ctrl_c_ends_it(server: Server) -> None:
    """The last test of the module."""
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    assert not _is_up(server.client)
