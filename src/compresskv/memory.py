"""Peak memory: of the allocator on a GPU, of the whole process on a CPU."""

import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start a new measurement. Where the system cannot (not Linux), the peak is that of the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # a container may forbid it
            return


def peak_nbytes(device: torch.device) -> int:
    """The largest number of bytes held at once since `reset_peak`; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
