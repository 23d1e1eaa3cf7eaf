"""The specification: blocks in order, in this thread, added by the fixed tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

from streamgmm.protocols import Block, Shared, Value

#: Children of a node of the addition tree. The tree is a function of the number of blocks alone.
FAN_IN = 8


class SerialExecutor:
    """What every other executor equals, bit for bit."""

    n_threads = 1

    def sized(self, blocks_per_task: int) -> SerialExecutor:
        """The same: blocks run one by one whatever the size of a task."""
        return self

    def map_reduce(self, kernel: Callable[[Shared, Block], Value], shared: Shared, blocks: Sequence[Block]) -> Value:
        return reduce_run(kernel, shared, blocks, span_of(len(blocks)))


def span_of(n: int) -> int:
    """The smallest power of FAN_IN that is at least n."""
    span = 1
    while span < n:
        span *= FAN_IN
    return span


def reduce_run(kernel: Callable[[Shared, Block], Value], shared: Shared, blocks: Sequence[Block], span: int) -> Value:
    """The subtree over up to ``span`` (a power of FAN_IN) blocks; holds at most two values a level."""
    if span == 1:
        return kernel(shared, blocks[0])
    child = span // FAN_IN
    starts = range(0, len(blocks), child)
    return reduce(add, (reduce_run(kernel, shared, blocks[i : i + child], child) for i in starts))
