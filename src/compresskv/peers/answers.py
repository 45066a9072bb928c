"""The command line of a module that the peers' python runs: a request in, JSON lines out."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compresskv.errors import CompressKVError, first_line

Write = Callable[[dict[str, Any]], None]


def answer_request(description: str, request_type: str, answer: Callable[[Path, Write], None]) -> int:
    """Answer the request named on the command line on stdout: the exit code.

    Args:
        request_type: the class whose `write` stored the request.
        answer: called with the request's file and what writes one result.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--request", type=Path, required=True, help=f"a JSON file: see {request_type}")
    options = parser.parse_args()
    sink: Any = sys.__stdout__

    def write(row: dict[str, Any]) -> None:
        sink.write(json.dumps(row) + "\n")
        sink.flush()

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not come between the results
        try:
            answer(options.request, write)
        except CompressKVError as err:
            write({"fatal": first_line(err)})
            return 2
    return 0
