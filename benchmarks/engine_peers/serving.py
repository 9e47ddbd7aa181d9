"""The contender's side of `bench_engine.py`: requests on stdin, answers on stdout, JSON lines.

The first line it writes, {}, says that it has loaded. A request {"prompts": [[token ids]],
"max_tokens": n} is answered by {"seconds": s}, the time from having token ids to having token ids,
or by {"error": line}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]


class Answers:
    """Standard output, kept for answers: what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, answer: dict[str, object]) -> None:
        """Write one line, at once."""
        self._file.write(json.dumps(answer) + "\n")
        self._file.flush()


def serve(answers: Answers, generate: Generate) -> None:
    """Answer requests until standard input ends.

    Args:
        generate: prompts, max_tokens → output token ids of each prompt. A ValueError says that
            this contender cannot run this point.
    """
    answers.send({})
    for line in sys.stdin:
        request = json.loads(line)
        max_tokens = request["max_tokens"]
        began_s = time.perf_counter()
        try:
            outputs = generate(request["prompts"], max_tokens)
        except ValueError as error:
            answers.send({"error": str(error)})
            continue
        seconds = time.perf_counter() - began_s
        lengths = [len(output) for output in outputs]
        if lengths != [max_tokens] * len(request["prompts"]):
            raise AssertionError(f"{max_tokens} tokens each were wanted, got {lengths}")
        answers.send({"seconds": seconds})
