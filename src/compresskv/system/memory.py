"""Memory: of the allocator on a GPU, of the whole process on a CPU."""

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor


def reset_peak(device: torch.device) -> bool:
    """Start a new measurement.

    Returns: False where the system cannot (not Linux): the peak is then that of the process's whole life.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # a container may forbid it
        return False
    return True


def peak_nbytes(device: torch.device) -> int:
    """The largest number of bytes held at once since `reset_peak`; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux" and (peak := _proc_nbytes("/proc/self/status", "VmHWM:")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _proc_nbytes("/proc/meminfo", "MemAvailable:") if sys.platform == "linux" else None


def release(device: torch.device) -> None:
    """Give back what was freed, so that the next peak counts it again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def storage_nbytes(tensors: list[Tensor | None]) -> int:
    """Bytes of the distinct storages behind `tensors`: a small view of a large tensor counts as the large one."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _proc_nbytes(path: str, field: str) -> int | None:
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None
