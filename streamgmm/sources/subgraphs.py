"""A dask array's graph, split into what serves one row chunk alone and what several of them share.

What serves one chunk alone runs inside the task that uses the chunk, so the chunk is never a result of its own that
waits in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import dask.base
from dask._task_spec import Task, convert_legacy_graph, execute_graph
from dask.core import flatten, toposort

#: The owner of a node that more than one row chunk is made from.
SHARED = -1


@dataclass(frozen=True, eq=False)
class Part:
    """What makes one row chunk.

    nodes: the part of the graph that serves this chunk alone.  keys: its column chunks, from left to right.
    needs: keys of shared nodes that it is made from.
    """

    nodes: Mapping[Hashable, Any]
    keys: tuple[Hashable, ...]
    needs: tuple[Hashable, ...]

    def made(self, values: Sequence[Any]) -> list[Any]:
        """The column chunks, from the values of the needs."""
        made: Any = dict(zip(self.needs, values, strict=True))
        if self.nodes:
            nodes: Any = dict(self.nodes)
            made = execute_graph(nodes, made, keys=set(self.keys))  # type: ignore[arg-type]
        return [made[key] for key in self.keys]


def split_graph(array: da.Array, *, fused: bool = True) -> tuple[tuple[Part, ...], dict[Hashable, Any]]:
    """A part for each row chunk, and the nodes that they share. fused: False leaves every node among the shared."""
    (optimised,) = dask.base.optimize(array)
    nodes = convert_legacy_graph(dict(optimised.__dask_graph__()))
    outputs = [tuple(flatten([row])) for row in optimised.__dask_keys__()]
    owners = _owners(nodes, outputs) if fused else dict.fromkeys(nodes, SHARED)
    private: list[dict[Hashable, Any]] = [{} for _ in outputs]
    shared: dict[Hashable, Any] = {}
    for key, node in nodes.items():
        (shared if owners[key] == SHARED else private[owners[key]])[key] = node
    parts = []
    for keys, own in zip(outputs, private, strict=True):
        used = [*keys, *(needed for node in own.values() for needed in node.dependencies)]
        parts.append(Part(own, keys, tuple(dict.fromkeys(key for key in used if key not in own))))
    return tuple(parts), _with_futures(shared, parts, array)


def count_tasks(array: da.Array) -> int:
    """Tasks that every read of the array runs anew, beyond one for each chunk, which is the read itself."""
    graph = convert_legacy_graph(dict(array.__dask_graph__()))
    return max(0, sum(isinstance(node, Task) for node in graph.values()) - array.npartitions)


def _owners(nodes: Mapping[Hashable, Any], outputs: Sequence[tuple[Hashable, ...]]) -> dict[Hashable, int]:
    """For every node the one row chunk that it serves, or SHARED."""
    inside = {key: node.dependencies & nodes.keys() for key, node in nodes.items()}
    claims: dict[Hashable, set[int]] = {key: set() for key in nodes}
    for i, keys in enumerate(outputs):
        for key in keys:
            if key in claims:
                claims[key].add(i)
    owners: dict[Hashable, int] = {}
    for key in reversed(toposort(nodes, dependencies=inside)):
        owners[key] = claims[key].pop() if len(claims[key]) == 1 else SHARED
        for needed in inside[key]:
            claims[needed].add(owners[key])
    return owners


def _with_futures(shared: dict[Hashable, Any], parts: Sequence[Part], array: da.Array) -> dict[Hashable, Any]:
    """The shared nodes and, for keys that no node makes, what the array holds: futures of a cluster."""
    used = {key for part in parts for key in part.needs}.union(*(node.dependencies for node in shared.values()))
    missing = used - shared.keys()
    if not missing:
        return shared
    held = dict(array.__dask_graph__())
    return {**shared, **{key: held[key] for key in missing if key in held}}
