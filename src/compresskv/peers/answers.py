"""What a peer's python runs: `python -m compresskv.peers.answers MODULE FILE`. A request in, JSON lines out.

The module's `answer` takes the request as its annotation says and yields results, one JSON line each on stdout.
"""

import contextlib
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from compresskv.errors import CompressKVError, DataError, first_line
from compresskv.system.convert import convert
from compresskv.system.files import write_whole
from compresskv.system.inputs import read_json

T = TypeVar("T")


def write_request(path: Path, request: Any) -> None:
    """Store a request, a dataclass, as JSON."""
    write_whole(path, msgspec.json.encode(request))


def read_request(path: Path, kind: type[T]) -> T:
    """Load what `write_request` stored.

    Raises:
        DataError: the file is missing or malformed; the message names it and the field.
        ConfigError: the request checks itself and cannot work.
    """
    try:
        return convert(read_json(path), kind)
    except CompressKVError:  # what the request says of itself
        raise
    except (OSError, ValueError) as err:
        raise DataError(f"is no request for peers ({first_line(err)})", option="request", value=str(path)) from err


def main(module: str, path: str) -> int:
    """Answer one request: the exit code."""
    sink: Any = sys.__stdout__

    def write(row: dict[str, Any]) -> None:
        sink.write(json.dumps(row) + "\n")
        sink.flush()

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not come between the results
        try:
            answer = import_module(module).answer
            for row in answer(read_request(Path(path), get_type_hints(answer)["request"])):
                write(row)
        except CompressKVError as err:
            write({"fatal": first_line(err)})
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
