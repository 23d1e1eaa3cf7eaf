"""Dask's schedulers in this process: the tree of the serial executor as a dask graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any
from uuid import uuid4

from streamgmm.executors.serial import FAN_IN, reduce_run, span_of
from streamgmm.protocols import Block, Shared, Value


class LocalExecutor:
    """Runs on a dask ``get`` function (``dask.get`` or ``dask.threaded.get``).

    A task is an aligned run of ``blocks_per_task`` blocks (a power of FAN_IN), so the tree stays the same whatever
    the size of a task. Names are new on every call: dask never takes an old result for a new one.
    """

    def __init__(self, get: Callable[..., Any], n_threads: int, blocks_per_task: int = 1) -> None:
        self._get = get
        self.n_threads = n_threads
        self.blocks_per_task = blocks_per_task

    def sized(self, blocks_per_task: int) -> LocalExecutor:
        """The same with another number of blocks a task."""
        return LocalExecutor(self._get, self.n_threads, blocks_per_task)

    def map_reduce(self, kernel: Callable[[Shared, Block], Value], shared: Shared, blocks: Sequence[Block]) -> Value:
        run, span = uuid4().hex, min(self.blocks_per_task, span_of(len(blocks)))
        parameters = f"parameters-{run}"
        # partial() hides its arguments from dask, which would look for keys and tasks inside them
        graph: dict[Any, Any] = {parameters: (partial(_itself, shared),)}
        level = []
        for i, start in enumerate(range(0, len(blocks), span)):
            key = (f"estep-{run}", i)
            task = partial(_estep, kernel=kernel, blocks=blocks[start : start + span], span=span)
            graph[key] = (task, parameters)
            level.append(key)
        while len(level) > 1:
            above = []
            for start in range(0, len(level), FAN_IN):
                key = (f"merge-{run}", len(graph))
                graph[key] = (_merge, level[start : start + FAN_IN])
                above.append(key)
            level = above
        value: Value = self._get(graph, level[0])
        return value


def _itself(value: Shared) -> Shared:
    return value


def _estep(shared: Shared, *, kernel: Callable[[Shared, Block], Value], blocks: Sequence[Block], span: int) -> Value:
    return reduce_run(kernel, shared, blocks, span)


def _merge(values: Sequence[Value]) -> Value:
    return reduce(add, values)
