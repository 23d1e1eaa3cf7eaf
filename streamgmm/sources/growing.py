"""Stores that grow: where a store is, which of its chunks are written, and when each was written last."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from streamgmm.errors import DataError, ParameterError, SourceError, shown
from streamgmm.sources.interrupts import uninterrupted
from streamgmm.sources.listing import chunk_key, held_keys
from streamgmm.sources.zarr_array import ZarrSource

#: Size in bytes, and when it was written in nanoseconds.
Stamp = tuple[int, int]

#: The stamp of what is there, and of which no more is known.
UNKNOWN = (0, 0)


@dataclass(frozen=True)
class Written:
    """What a store holds. stamps: of each row of chunks that is whole, by its number.  last: the last one of which
    anything is there, -1 where there is nothing."""

    grid_rows: int
    stamps: dict[int, Stamp]
    last: int

    def absent(self, start: int, stop: int) -> int | None:
        """The first row of chunks of rows [start, stop) that is not whole."""
        numbers = range(start // self.grid_rows, -(-stop // self.grid_rows))
        return next((number for number in numbers if number not in self.stamps), None)

    def stamp(self, start: int, stop: int) -> Stamp:
        """Size and time of the chunks of rows [start, stop); what is not there counts nothing."""
        numbers = range(start // self.grid_rows, -(-stop // self.grid_rows))
        found = [self.stamps[number] for number in numbers if number in self.stamps]
        return sum(size for size, _ in found), max((time for _, time in found), default=0)


def place_key(array: zarr.Array[Any]) -> str | None:
    """A hash of where an array is. The place itself, which may hold a name or a credential, is not kept anywhere.

    None for an array in memory: it has no place that another could not have later.
    """
    store = array.store
    if isinstance(store, MemoryStore):
        return None
    if isinstance(store, LocalStore):
        place = str(Path(store.root, array.path).resolve())
    else:
        system = getattr(store, "fs", None)
        root = str(store) if system is None else f"{system.protocol}:{getattr(store, 'path', '')}"
        place = f"{root}/{array.path}".rstrip("/")
    return hashlib.sha256(place.encode()).hexdigest()


@uninterrupted()
def look(array: zarr.Array[Any]) -> Written:
    """Which chunks (shards, where there are any) the store holds now. SourceError where it does not answer."""
    shape = array.shards or array.chunks
    rows, *others = (range(-(-size // step)) for size, step in zip(array.shape, shape, strict=True))
    keys = {place: chunk_key(array, place) for place in product(rows, *others)}
    try:
        found = _local_stamps(array.store, keys) if isinstance(array.store, LocalStore) else _held(array, keys)
    except Exception as error:  # stores raise what their transport raises
        raise SourceError(
            f"The store does not say which chunks it holds ({type(error).__name__}). Check that it can be reached and "
            "that you may read it."
        ) from error
    stamps: dict[int, Stamp] = {}
    for number in rows:
        beside = [found[number, *place] for place in product(*others) if (number, *place) in found]
        if len(beside) == prod(map(len, others)):
            stamps[number] = (sum(size for size, _ in beside), max(time for _, time in beside))
    return Written(int(shape[0]), stamps, max((place[0] for place in found), default=-1))


def _local_stamps(store: LocalStore, keys: dict[tuple[int, ...], str]) -> dict[tuple[int, ...], Stamp]:
    found = {}
    for place, key in keys.items():
        try:
            status = os.stat(os.path.join(store.root, key))
        except FileNotFoundError:
            continue
        if status.st_size:
            found[place] = (status.st_size, status.st_mtime_ns)
    return found


def _held(array: zarr.Array[Any], keys: dict[tuple[int, ...], str]) -> dict[tuple[int, ...], Stamp]:
    """The chunks that are there. What they are like is not asked: it would take a request for each of them."""
    held = sync(held_keys(array, keys.values()))
    return {place: UNKNOWN for place, key in keys.items() if key in held}


def rows_written(source: ZarrSource, stop: Any) -> int | None:
    """The rows that the caller, or the writer, says are written; None where nobody says.

    stop: a number of rows, the name of an attribute of the array that holds one, or None. Raises ParameterError or
    DataError where that is no number of rows of the array.
    """
    if stop is None:
        return None
    said, where = stop, "stop"
    if isinstance(stop, str):
        if stop not in source.array.attrs:
            raise DataError(
                f"{source.name} has no attribute {stop!r:.80} that says how many rows are written. Let the writer set "
                "it after each append, or give stop=ROWS."
            )
        said, where = source.array.attrs[stop], f"the attribute {stop!r:.80} of {source.name}"
    elif isinstance(stop, bool) or not hasattr(stop, "__index__") or int(stop) < 0:
        raise ParameterError(f"stop must be a number of rows or the name of an attribute, but it is {shown(stop)}.")
    if isinstance(said, bool) or not hasattr(said, "__index__") or not 0 <= int(said) <= source.n_rows:
        raise DataError(f"{where} is {shown(said)}, but {source.name} has {source.n_rows:,} rows: expected 0 to that.")
    return int(said)
