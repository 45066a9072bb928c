"""What eviction did, on vLLM's metrics endpoint.

vLLM's engine, its workers and its API server are processes of their own. Each writes a file of prometheus_client's
multiprocess format into one folder, and a collector in the API server adds them up when the endpoint is read.
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

_FOLDER = "COMPRESSKV_COUNTERS_DIR"  # inherited by the processes that vLLM starts
_VLLMS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where vLLM runs several API servers: they read it already
_HELP = {
    "compresskv:evicted_prompts": "Prompts that were cut to their budget.",
    "compresskv:evicted_tokens": "Prompt tokens evicted from the KV cache.",
    "compresskv:freed_blocks": "KV cache blocks given back at the end of prefill.",
    "compresskv:scoring_seconds": "Seconds spent scoring prompt tokens.",
    "compresskv:compaction_seconds": "Seconds spent moving the retained keys and values.",
}


@functools.cache
def publish() -> None:
    """Let this process's metrics endpoint show the counters, and the processes it starts write them."""
    is_vllms_child = multiprocessing.parent_process() is not None and _FOLDER in os.environ
    if (
        is_vllms_child or _VLLMS_FOLDER in os.environ
    ):  # a folder that another program left in the environment is not ours
        return
    folder = tempfile.mkdtemp(prefix="compresskv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_FOLDER] = folder
    MultiProcessCollector(REGISTRY, path=folder)


class Counters:
    """The counters of this process. Writing one is a store into mapped memory."""

    def __init__(self, folder: Path) -> None:
        self._values = MmapedDict(str(folder / f"counter_compresskv-{os.getpid()}.db"))

    def add(self, name: str, amount: float) -> None:
        """Raise the counter 'compresskv:NAME'."""
        name = f"compresskv:{name}"
        key = mmap_key(name, f"{name}_total", (), (), _HELP[name])
        value, timestamp = self._values.read_value(key)
        self._values.write_value(key, value + amount, timestamp)

    def total(self, name: str) -> float:
        """The counter's value in this process."""
        name = f"compresskv:{name}"
        key = mmap_key(name, f"{name}_total", (), (), _HELP[name])
        value: float = self._values.read_value(key)[0]
        return value


@functools.cache
def counters() -> Counters:
    """This process's."""
    folder = os.environ.get(_VLLMS_FOLDER) or os.environ[_FOLDER]
    return Counters(Path(folder))
