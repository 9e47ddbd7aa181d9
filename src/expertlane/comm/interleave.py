"""Running computations that yield where they wait for communication.

A layer's forward pass is a generator: it begins a transfer, yields it, and is sent the result. One
batch is exhausting one generator; two-batch overlap is interleaving two, so that one computes
while the other's tokens travel.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

from expertlane.comm.collectives import Pending

ResultT = TypeVar("ResultT")

Steps = Generator[Pending, Tensor, ResultT]


def interleave(computations: Sequence[Steps[ResultT]]) -> list[ResultT]:
    """Run all computations to their ends, switching at every wait; results in the given order.

    Each is run up to its next wait in turn, so every rank that runs the same computations begins
    their transfers in the same order, whatever the sizes.
    """
    results: dict[int, ResultT] = {}
    waiting: deque[tuple[int, Pending | None]] = deque((i, None) for i in range(len(computations)))
    while waiting:
        index, pending = waiting.popleft()
        computation = computations[index]
        try:
            following = computation.send(pending.wait()) if pending else next(computation)
        except StopIteration as stop:
            results[index] = stop.value
        else:
            waiting.append((index, following))
    return [results[index] for index in range(len(computations))]
