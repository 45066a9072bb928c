"""Start the peers' process and take its results as they come."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compresskv.errors import CompressKVError, ConfigError
from compresskv.peers import answers
from compresskv.peers.answers import write_request
from compresskv.system.paths import is_file

PYTHON_VARIABLE = "COMPRESSKV_PEERS_PYTHON"


@dataclass(frozen=True)
class Environment:
    """Where a peer is installed."""

    variable: str
    """Names the environment variable that holds its python."""
    folder: str
    """Where it is looked for else."""
    script: str
    """Makes it."""
    package: str
    """Is imported there; where it can be imported here, no other environment is needed."""

    @property
    def how_to(self) -> str:
        """What to do where it is missing."""
        return f"{self.script} makes the environment and prints its python, which {self.variable} may name"


KVPRESS = Environment(PYTHON_VARIABLE, ".venv-peers", "scripts/peers", "kvpress")
VLLM = Environment("COMPRESSKV_VLLM_PYTHON", ".venv-vllm", "scripts/environment-vllm", "vllm")
LLAMA_CPP = Environment("COMPRESSKV_LLAMA_CPP_PYTHON", ".venv-llama-cpp", "scripts/environment-llama-cpp", "llama_cpp")


def peers_python(chosen: Path | None = None, environment: Environment = KVPRESS) -> Path:
    """The interpreter of the peers' environment.

    That is the chosen one, that of its variable, that of its folder here, or this one if the peer is installed here.

    Raises:
        ConfigError: there is none.
    """
    named = chosen or os.environ.get(environment.variable)
    python = Path(named or f"{environment.folder}/bin/python")
    if not is_file(python):
        if not named and importlib.util.find_spec(environment.package) is not None:
            return Path(sys.executable)
        raise ConfigError(f"the peers' python {python} does not exist: {environment.how_to}")
    return python


def run_peers(
    python: Path, request: Any, module: str, environment: Environment = KVPRESS
) -> Generator[dict[str, Any], None, None]:
    """Run the request in another environment; ends its process where the caller stops early or is interrupted.

    Args:
        request: a dataclass, of the type that `answer` in the module takes.
        module: whose `answer` yields the results.
    Returns: each result, as soon as it is known.
    Raises:
        ConfigError: the environment is missing or lacks the peer, or nothing in the request can be run.
        CompressKVError: the process ended early or wrote what is not a result.
    """
    return _results(peers_python(python, environment), request, module, environment)


def _results(
    python: Path, request: Any, module: str, environment: Environment
) -> Generator[dict[str, Any], None, None]:
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        path = Path(folder) / "request.json"
        write_request(path, request)
        command = [str(python), "-m", answers.__name__, module, str(path)]
        with _started(command, log, environment) as process:
            try:
                for line in process.stdout or ():
                    yield _parse(line)
            except BaseException:  # an interrupt and the caller's `close` too
                process.kill()
                raise
        if process.returncode != 0:
            raise _explain(python, process.returncode, log, environment)


def _started(command: list[str], log: IO[bytes], environment: Environment) -> "subprocess.Popen[str]":
    # What it logs goes to a file: a pipe that nobody reads fills up, and then the process waits for ever.
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as err:
        raise ConfigError(
            f"the peers' python {command[0]} cannot be started ({err.strerror}): {environment.how_to}"
        ) from err


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise CompressKVError(f"the peers' process wrote a line that is no result: {line.strip()[:80]!r}")
    if "fatal" in row:
        raise ConfigError(f"peers: {row['fatal']}")
    return row


def _explain(python: Path, status: int, log: IO[bytes], environment: Environment) -> CompressKVError:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if "No module named" in last:
        return ConfigError(f"the peers' python {python} lacks a package ({last}): {environment.how_to}")
    return CompressKVError(f"the peers' process ended with status {status} ({last})")
