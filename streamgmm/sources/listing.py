"""Which chunks of a zarr array its store does not hold. zarr reads them as the fill value without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import Any

import zarr
from zarr.core.sync import sync

from streamgmm.errors import SourceError
from streamgmm.sources.interrupts import uninterrupted

#: Chunks that are asked for at a time.
REQUESTS = 32

#: Where the description of an array lies beside its chunks, by the version of the format.
DESCRIPTIONS = {2: ".zarray", 3: "zarr.json"}

#: Chunks that a sentence names.
MOST_NAMED = 5


@dataclass(frozen=True)
class Absent:
    """Chunks, or shards, that are not there or have no byte.

    count, of: how many, of how many.  first: the numbers of the first ones along (rows, features), in order.
    """

    unit: str
    count: int
    of: int
    first: tuple[tuple[int, ...], ...]
    unit_rows: int
    n_rows: int

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        named = ", ".join("/".join(map(str, place)) for place in self.first)
        rows = ", ".join(f"{start} to {stop - 1}" for start, stop in self._runs())
        return f"{self.count:,} of {self.of:,} {self.unit}s ({named}{more}: rows {rows}{more})"

    def _runs(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of the rows of the first ones, neighbours joined."""
        numbers = sorted({place[0] for place in self.first})
        starts = [number for number in numbers if number - 1 not in numbers]
        ends = [number + 1 for number in numbers if number + 1 not in numbers]
        for start, end in zip(starts, ends, strict=True):
            yield start * self.unit_rows, min(end * self.unit_rows, self.n_rows)


@uninterrupted()
def absent_chunks(array: zarr.Array[Any]) -> Absent:
    """The chunks (shards, where there are any) that the store's listing lacks, and shards without a byte.

    Costs one listing, and a look at the size of each shard. A store that does not list, such as one behind plain http,
    is asked for each chunk instead. A chunk without a byte fails when it is read. Raises SourceError where the store
    does not answer.
    """
    try:
        return _absent(array)
    except Exception as error:  # stores raise what their transport raises
        raise SourceError(
            f"The store does not say which chunks it holds ({type(error).__name__}). Check that it can be reached and "
            "that you may read it."
        ) from error


def _absent(array: zarr.Array[Any]) -> Absent:
    shape = array.shards or array.chunks
    grid = [range(-(-size // step)) for size, step in zip(array.shape, shape, strict=True)]

    def key(place: tuple[int, ...]) -> str:
        return chunk_key(array, place)

    held = sync(held_keys(array, map(key, product(*grid))))
    if array.shards is not None:
        held = sync(_chosen(array.store.getsize, held.intersection(map(key, product(*grid)))))
    absent = (place for place in product(*grid) if key(place) not in held)
    first = tuple(islice(absent, MOST_NAMED))
    count = len(first) + sum(1 for _ in absent)
    unit = "chunk" if array.shards is None else "shard"
    return Absent(unit, count, prod(map(len, grid)), first, int(shape[0]), int(array.shape[0]))


def chunk_key(array: zarr.Array[Any], place: tuple[int, ...]) -> str:
    """Where the store keeps the chunk (shard) with these numbers along (rows, features)."""
    return _prefix(array) + array.metadata.encode_chunk_key(place)


def _prefix(array: zarr.Array[Any]) -> str:
    return f"{array.path}/" if array.path else ""


async def held_keys(array: zarr.Array[Any], keys: Iterable[str]) -> set[str]:
    """What the store holds: all that it lists, or those of ``keys`` that it has where it does not list."""
    held = await _listed_keys(array, _prefix(array))
    if _prefix(array) + DESCRIPTIONS[array.metadata.zarr_format] not in held:  # what does not show even this is none
        return await _chosen(array.store.exists, keys)
    return held


async def _listed_keys(array: zarr.Array[Any], prefix: str) -> set[str]:
    """All that the store lists below ``prefix``; nothing where it cannot, or may not."""
    try:
        return {key async for key in array.store.list_prefix(prefix)}
    except Exception:  # stores raise what their transport raises
        return set()


async def _chosen(ask: Callable[[str], Awaitable[Any]], keys: Iterable[str]) -> set[str]:
    """The keys for which the answer is not zero or False, a few asked for at a time."""
    limit = asyncio.Semaphore(REQUESTS)

    async def answer(key: str) -> tuple[str, Any]:
        async with limit:
            return key, await ask(key)

    return {key for key, answered in await asyncio.gather(*map(answer, keys)) if answered}
