"""Parts in processes of their own: one answers, one hangs after it told something, one fails."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import answer_part

Tell = Callable[[Mapping[str, Any]], None]


def answers(task: dict[str, Any], tell: Tell) -> Mapping[str, Any]:
    return {"doubled": 2 * task["number"]}


def hangs(task: dict[str, Any], tell: Tell) -> Mapping[str, Any]:
    tell({"rows": [1]})
    print("going on", flush=True)
    time.sleep(60)
    return {}


def fails(task: dict[str, Any], tell: Tell) -> Mapping[str, Any]:
    raise ValueError("out of numbers")


if __name__ == "__main__":
    answer_part({"answers": answers, "hangs": hangs, "fails": fails}, sys.argv[2], Path(sys.argv[3]))
