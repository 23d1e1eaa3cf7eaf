"""The specification: blocks in order, in this thread, added by the fixed tree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from streamgmm.protocols import Block, Capacity, Shared, Value

#: Children of a node of the addition tree. The tree is a function of the number of blocks alone.
FAN_IN = 8


class SerialExecutor:
    """What every other executor equals, bit for bit. For blocks that need nothing from a graph."""

    capacity = Capacity(1)

    def sized(self, blocks_per_task: int) -> SerialExecutor:
        """The same: blocks run one by one whatever the size of a task."""
        return self

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        call_each(checks)

    def map_reduce(
        self,
        kernel: Callable[[Shared, Block], Value],
        shared: Shared,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] | None = None,
    ) -> Value:
        def on_block(shared: Shared, block: Block) -> Value:
            return kernel(shared, block.opened(()))

        return reduce_run(on_block, shared, blocks, span_of(len(blocks)))


def call_each(checks: Sequence[Callable[[], None]]) -> None:
    """What ``everywhere`` does in one process."""
    for check in checks:
        check()


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
