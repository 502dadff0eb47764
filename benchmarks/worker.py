"""A process that computes when it is asked to: one JSON object a line on stdin, one on stdout.

Standard library only: it also runs in the environments of peers.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Handler = Callable[..., dict[str, Any]]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer requests `{"op": name, ...arguments}` by calling the handlers, until stdin ends.

    An answer is the handler's dictionary, or `{"error": text}`. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("op")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@contextmanager
def timed(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sets `answer["seconds"]` to the wall time of the block."""
    start = time.perf_counter()
    yield answer
    answer["seconds"] = time.perf_counter() - start
