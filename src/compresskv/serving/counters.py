"""What eviction did, on vLLM's metrics endpoint and in its log.

vLLM's engine, its workers and its API server are processes of their own. Each writes a file of prometheus_client's
multiprocess format into one folder, and a collector in the API server adds them up when the endpoint is read.

vLLM's plugins for statistics (vllm.stat_logger_plugins) would not do: they run in the API server and are given vLLM's
own statistics alone, which have no field for others', and nothing of what its workers measure.
"""

import functools
import multiprocessing
import os
import struct
from contextlib import suppress
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from compresskv.serving.scratch import make_scratch

_FOLDER = "COMPRESSKV_COUNTERS_DIR"  # inherited by the processes that vLLM starts
_VLLMS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where vLLM runs several API servers: they read it already
_PREFIX = "compresskv:"
_FILE = "counter_compresskv-{}.db"
_UNREADABLE = (OSError, ValueError, RuntimeError, struct.error)  # gone, empty, or cut short
_HELP = {
    "evicted_prompts": "Prompts that were cut to their budget; a preempted request's again each time that it is read.",
    "cut_answers": "Cuts of what was generated, of which a long answer has many.",
    "evicted_tokens": "Tokens evicted from the KV cache.",
    "freed_blocks": "KV cache blocks that cuts left free for others: without those that other requests still hold, "
    "and without the fresh ones that retained tokens moved to.",
    "whole_prompts": "Prompts kept whole that should have been cut: no room for a copy in the pool, or a session's.",
    "unscored_prompts": "Prompts of which the first and the last tokens were kept, for they could not be scored.",
    "scoring_seconds": "Seconds that the device spent scoring prompt tokens and choosing among them.",
    "compaction_seconds": "Seconds that the device spent moving the retained keys and values.",
}


@functools.cache
def publish() -> None:
    """Let this process's metrics endpoint show the counters, and the processes it starts write them."""
    is_vllms_child = multiprocessing.parent_process() is not None and _FOLDER in os.environ
    # a folder that another program left in the environment is not ours
    if is_vllms_child or _VLLMS_FOLDER in os.environ:
        return
    folder = make_scratch()
    os.environ[_FOLDER] = str(folder)
    MultiProcessCollector(REGISTRY, path=str(folder))


class Counters:
    """The counters of this process. Writing one is a store into mapped memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _FILE.format(os.getpid())
        self._values = MmapedDict(str(self._path))

    def add(self, name: str, amount: float) -> None:
        """Raise the counter 'compresskv:NAME'."""
        key = _key(name)
        value, timestamp = self._values.read_value(key)
        self._values.write_value(key, value + amount, timestamp)

    def total(self, name: str) -> float:
        """The counter's value in this process."""
        value: float = self._values.read_value(_key(name))[0]
        return value

    def totals(self) -> dict[str, float]:
        """All counters over all processes: workers know other ones than the scheduler.

        A file that cannot be read is left out, as others may remove what lies in the folder; this process's own values
        come from its memory.
        """
        names = {_key(name): name for name in _HELP}
        sums = dict.fromkeys(_HELP, 0.0)
        for key, value in [*self._own_values(), *self._others_values()]:
            if key in names:
                sums[names[key]] += value
        return sums

    def _own_values(self) -> list[tuple[str, float]]:
        return [(key, value) for key, value, _ in self._values.read_all_values()]

    def _others_values(self) -> list[tuple[str, float]]:
        """Of our files alone: vLLM's own metrics may lie beside them."""
        values: list[tuple[str, float]] = []
        with suppress(OSError):  # the folder may be gone
            for path in self._folder.glob(_FILE.format("*")):
                if path == self._path:
                    continue
                with suppress(*_UNREADABLE):
                    found = MmapedDict.read_all_values_from_file(str(path))
                    values += [(key, value) for key, value, *_ in found]  # all of a file, or nothing
        return values


def _key(name: str) -> str:
    key: str = mmap_key(f"{_PREFIX}{name}", f"{_PREFIX}{name}_total", (), (), _HELP[name])
    return key


def counters() -> Counters:
    """This process's."""
    return _counters_of(os.getpid())  # and not those of the process that it was forked from


@functools.cache
def _counters_of(_pid: int) -> Counters:
    folder = os.environ.get(_VLLMS_FOLDER) or os.environ[_FOLDER]
    return Counters(Path(folder))
