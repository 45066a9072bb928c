"""Which processor this is."""

import platform
import sys
from pathlib import Path


def processor_name() -> str:
    """The processor's product name, where the system tells; else its architecture."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
