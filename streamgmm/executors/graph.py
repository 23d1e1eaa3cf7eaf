"""The tree of the serial executor as a dask graph: the parameters once, a task for each run of blocks, merges."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any
from uuid import uuid4

from dask._task_spec import TaskRef

from streamgmm.executors.blas import single_blas_thread
from streamgmm.executors.serial import FAN_IN, reduce_run, span_of
from streamgmm.protocols import Block, Shared, Value


@dataclass(frozen=True)
class Reduction:
    """A graph whose ``root`` is the sum. runs: the blocks of each task, by its key."""

    graph: dict[Any, Any]
    root: Any
    runs: dict[Any, Sequence[Block]]


def reduction(
    kernel: Callable[[Shared, Block], Value],
    shared: Shared,
    blocks: Sequence[Block],
    graph: Mapping[Hashable, Any],
    blocks_per_task: int,
    *,
    guarded: bool,
) -> Reduction:
    """The graph of one map_reduce.

    A task is an aligned run of ``blocks_per_task`` blocks (a power of FAN_IN), so the tree stays the same whatever the
    size of a task. Names are new on every call: dask never takes an old result for a new one. guarded: tasks run in
    processes where nobody else sees to it that BLAS takes one thread.
    """
    run, span = uuid4().hex, min(blocks_per_task, span_of(len(blocks)))
    parameters = (f"parameters-{run}", 0)
    # shared nodes have new names too: a cluster may hold results of those, of a store that was written anew since
    names = {key: _renamed(key, run) for key, node in graph.items() if not isinstance(node, TaskRef)}
    nodes: dict[Any, Any] = {
        names.get(key, key): node.substitute(names, names[key]) if key in names else node for key, node in graph.items()
    }
    # partial() hides its arguments from dask, which would look for keys and tasks inside them
    nodes[parameters] = (partial(_itself, shared),)
    runs: dict[Any, Sequence[Block]] = {}
    for i, start in enumerate(range(0, len(blocks), span)):
        key, part = (f"{kernel.__name__.replace('_', '')}-{run}", i), blocks[start : start + span]
        task = partial(_map, kernel=kernel, blocks=part, span=span, guarded=guarded)
        nodes[key] = (task, parameters, [names.get(needed, needed) for block in part for needed in block.needs])
        runs[key] = part
    level = list(runs)
    while len(level) > 1:
        above = []
        for start in range(0, len(level), FAN_IN):
            key = (f"merge-{run}", len(nodes))
            nodes[key] = (_merge, level[start : start + FAN_IN])
            above.append(key)
        level = above
    return Reduction(nodes, level[0], runs)


def _renamed(key: Any, run: str) -> Any:
    return (f"{key[0]}-{run}", *key[1:]) if isinstance(key, tuple) else f"{key}-{run}"


def _itself(value: Shared) -> Shared:
    return value


def _map(
    shared: Shared,
    values: Sequence[Any],
    *,
    kernel: Callable[[Shared, Block], Value],
    blocks: Sequence[Block],
    span: int,
    guarded: bool,
) -> Value:
    """The subtree over a run of blocks; values: those of the blocks' needs, in order."""
    left = list(values)

    def on_block(shared: Shared, block: Block) -> Value:
        n = len(block.needs)
        given, left[:n] = left[:n], []
        return kernel(shared, block.opened(given))

    # the guard counts its holders under a lock, so that tasks of several threads may come and go
    with single_blas_thread() if guarded else nullcontext():
        return reduce_run(on_block, shared, blocks, span)


def _merge(values: Sequence[Value]) -> Value:
    return reduce(add, values)
