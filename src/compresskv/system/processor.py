"""Which processor this is."""

import platform
import sys
from pathlib import Path


def processor_name() -> str:
    """The processor's product name, where the system tells; else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """What the processor can do, as the system lists it: machines of one product name may differ."""
    return _cpuinfo("flags", "Features") or processor_name()


def _cpuinfo(*fields: str) -> str | None:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(fields):
                return line.partition(":")[2].strip()
    return None
