"""vLLM engines, in this very process, so that tests can look into the scheduler, the runner and the cache."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from engine import Engine

CLEAN_ENVIRONMENT = dict(os.environ)
"""For servers: vLLM notes names of this process's shared memory and ports in the environment."""

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
for _variable in (
    "BUDGET",
    "METHOD",
    "PROFILE",
    "CHUNK_BUDGET",
    "CHUNK_TOKENS",
    "DECODE_BUDGET",
    "DECODE_INTERVAL",
    "DECODE_METHOD",
):
    os.environ.pop(f"COMPRESSKV_{_variable}", None)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Every module here needs vLLM; without it the folder is skipped."""
    pytest.importorskip("vllm", reason="vLLM is not installed: run scripts/test-serving")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn about themselves."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def _whole_machine() -> None:
    """One engine runs at a time: it may have all cores."""
    if "OMP_NUM_THREADS" not in CLEAN_ENVIRONMENT:
        torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment as it was before vLLM ran in this process."""
    return dict(CLEAN_ENVIRONMENT)


@pytest.fixture(scope="session")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model that reads text, see `readable_engine_options`."""
    return tmp_path_factory.mktemp("readable")


@pytest.fixture(scope="session")
def plain(readable: Path) -> "Iterator[Engine]":
    """vLLM as it is."""
    from engine import start
    from random_model import readable_engine_options

    yield from start(**readable_engine_options(readable))


@pytest.fixture(scope="session")
def roomy(readable: Path) -> "Iterator[Engine]":
    """Prompts are cut to 200 tokens; there is room for all; a step reads 700 tokens."""
    from engine import start
    from random_model import readable_engine_options

    yield from start(**readable_engine_options(readable, budget=200))


@pytest.fixture(scope="session")
def cramped(readable: Path) -> "Iterator[Engine]":
    """Prompts are cut to 120 tokens; the pool holds three prompts of 1,000 tokens."""
    from engine import start
    from random_model import readable_engine_options

    options = readable_engine_options(readable, budget=120)
    yield from start(**options, num_gpu_blocks_override=25, max_model_len=3000)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """A random model, see `small_engine_options`."""
    from engine import start
    from random_model import small_engine_options

    yield from start(**small_engine_options(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def small_async(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small`, with prefix caching, and scheduled asynchronously."""
    from engine import start
    from random_model import small_engine_options

    options = small_engine_options(tmp_path_factory.mktemp("small"))
    yield from start(**options, enable_prefix_caching=True, asynchronous=True)


@pytest.fixture(scope="session")
def small_caching(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small`, with prefix caching."""
    from engine import start
    from random_model import small_engine_options

    yield from start(**small_engine_options(tmp_path_factory.mktemp("small")), enable_prefix_caching=True)


@pytest.fixture(scope="session")
def small_chunks(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small`, with a pool of 320 tokens for longer prompts, which are cut while they are read."""
    from engine import start
    from random_model import chunked_engine_options

    yield from start(**chunked_engine_options(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def small_answers(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small_chunks`, and what is generated is cut, too."""
    from engine import start
    from random_model import DECODING, chunked_engine_options

    options = chunked_engine_options(tmp_path_factory.mktemp("small"))
    options["compresskv"] |= DECODING
    yield from start(**options)


@pytest.fixture(scope="session")
def small_answers_async(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small_async`, and what is generated is cut, too."""
    from engine import start
    from random_model import DECODING, small_engine_options

    options = small_engine_options(tmp_path_factory.mktemp("small"))
    options["compresskv"] |= DECODING
    yield from start(**options, enable_prefix_caching=True, asynchronous=True)


@pytest.fixture(scope="session")
def small_chunks_async(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Engine]":
    """As `small_chunks`, with prefix caching, and scheduled asynchronously."""
    from engine import start
    from random_model import chunked_engine_options

    options = chunked_engine_options(tmp_path_factory.mktemp("small"))
    yield from start(**options, enable_prefix_caching=True, asynchronous=True)
