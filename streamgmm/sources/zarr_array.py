"""Rows in a zarr array, read one storage chunk (or shard) at a time where the work runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import zarr
from zarr.storage import MemoryStore

from streamgmm.errors import DataError, ParameterError, SourceError, shown
from streamgmm.protocols import Executor, Piece, Rows
from streamgmm.sources.dtypes import n_columns, require_real_rows, require_some_rows
from streamgmm.sources.grid import STORE_BLOCK_BYTES, checked_block_rows, ranges
from streamgmm.sources.interrupts import uninterrupted
from streamgmm.sources.listing import absent_chunks
from streamgmm.sources.packing import Packing, packing_of


@dataclass(frozen=True)
class Reading:
    """What the user said about the values of a store.

    omits_nan: rows with NaN are left out.  fills: chunks that are not there may be read as the fill value.  decodes:
    packed numbers are decoded by the CF conventions.  waits: chunks that are not there may still come.
    """

    omits_nan: bool = False
    fills: bool = False
    decodes: bool = False
    waits: bool = False


@dataclass(frozen=True, eq=False)
class ZarrBlock:
    """Rows [start, stop) of a zarr array, as a reference: the array holds its store and metadata, never data."""

    array: zarr.Array[Any]
    name: str
    start: int
    stop: int
    needs: Sequence[Hashable] = ()
    packing: Packing | None = None
    omits_nan: bool = False

    @property
    def n_features(self) -> int:
        return n_columns(self.array.shape)

    def opened(self, values: Sequence[Any]) -> ZarrBlock:
        return self

    def pieces(self) -> Iterator[Piece]:
        """One storage chunk (all its columns) at a time. SourceError names the chunk that cannot be read."""
        require_reachable(self.array, self.name)
        grid = _grid(self.array)[0]
        start = self.start
        while start < self.stop:
            stop = min((start // grid + 1) * grid, self.stop)
            rows = self._read(start, stop)
            if self.packing is not None:
                rows = self.packing.decoded(rows, partial(self._locate_from, start))
            yield Piece(rows, None)
            del rows  # else it lives while the next one is read
            start = stop

    def locate(self, row: int, column: int) -> str:
        rows, columns = _grid(self.array)
        unit = "chunk" if self.array.shards is None else "shard"
        return f"row {row}, column {column} ({unit} {row // rows}/{column // columns} of {self.name})"

    def _locate_from(self, start: int, row: int, column: int) -> str:
        return self.locate(start + row, column)

    @uninterrupted()
    def _read(self, start: int, stop: int) -> Rows:
        try:
            return np.asarray(self.array[start:stop])
        except Exception as error:  # codecs raise whatever they like, and none of it says which chunk
            place = self.locate(start, self._bad_column(start, stop))
            raise SourceError(
                f"The rows from {place} on could not be read: {type(error).__name__}: {error}. The chunk is damaged, "
                "or its store cannot be reached; write the chunk anew, or fix the access."
            ) from error

    def _bad_column(self, start: int, stop: int) -> int:
        """The first column of the chunk that cannot be read; 0 where each can be read now."""
        size = _grid(self.array)[1]
        for column in range(0, self.n_features, size):
            try:
                self.array[(slice(start, stop), slice(column, column + size))[: self.array.ndim]]
            except Exception:  # whatever the codec raised before
                return column
        return 0


@dataclass(frozen=True, eq=False)
class ZarrSource:
    """A zarr array of shape (n, d).

    unit_rows: rows that are learned in one step where the array grows: those of a shard, else a chunk, or
    ``block_rows`` where the user gave it.
    """

    array: zarr.Array[Any]
    name: str
    block_rows: int
    unit_rows: int
    packing: Packing | None = None
    reading: Reading = Reading()
    in_memory: bool = False
    uncounted: tuple[str, ...] = ()
    divisible: bool = True
    graph: Mapping[Hashable, Any] = field(default_factory=dict)
    upstream_tasks: float = 0.0
    weight_bytes: int = 0

    @classmethod
    def of(
        cls,
        array: zarr.Array[Any],
        block_rows: int | None = None,
        *,
        column: bool = False,
        reading: Reading = Reading(),
    ) -> ZarrSource:
        """The source of an array; lists its chunks.

        Raises DataError or DataTypeError where the array is not (n, d), or (n,) for a column, of real numbers, or is
        packed and not to be decoded; SourceError where chunks are missing that may not be filled.
        """
        name = _name_of(array)
        if not all(array.shards or array.chunks):
            raise SourceError(f"{name} has chunks {array.chunks} of nothing: its metadata are damaged. Write it anew.")
        require_real_rows(array.shape, array.dtype, name, column=column, stored=True, grows=reading.waits)
        size = checked_block_rows(block_rows, _grid(array)[0], n_columns(array.shape), STORE_BLOCK_BYTES)
        dtype, form = np.dtype(array.dtype), array.metadata.zarr_format
        packing = packing_of(array.attrs.asdict(), dtype, array.fill_value, form, name)
        if packing is not None and not reading.decodes:
            raise DataError(_packed(name, packing, column=column))
        unit = _grid(array)[0] if block_rows is None else size
        source = cls(array, name, size, unit, packing, reading)
        if not reading.waits:
            source.require_complete(column=column)
        return source

    @property
    def omits_nan(self) -> bool:
        return self.reading.omits_nan

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def n_features(self) -> int:
        return n_columns(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype if self.packing is None else np.float64)

    @property
    def grid_rows(self) -> int:
        return _grid(self.array)[0]

    @property
    def stored_chunks(self) -> int:
        return prod(-(-size // step) for size, step in zip(self.array.shape, self.array.chunks, strict=True))

    @property
    def travels(self) -> bool:
        return not isinstance(self.array.store, MemoryStore)

    @property
    def checks(self) -> list[Callable[[], None]]:
        return [partial(require_reachable, self.array, self.name)]

    def require_complete(self, *, column: bool = False) -> None:
        """SourceError where the listing lacks chunks whose fill value would be taken for rows, DataError without a row.

        Where the fill value is NaN, and rows with NaN are left out, it is what the user asked for.
        """
        require_some_rows(self.array.shape, self.name)
        absent = None if self.reading.fills else absent_chunks(self.array)
        if absent is None or not absent.count:
            return
        stored = self.array.fill_value if self.array.fill_value is not None else 0
        fill, packing = np.asarray(stored, dtype=self.array.dtype), self.packing
        value = (fill if packing is None else packing.decoded(fill.reshape(1), lambda *_: "the fill value")).item()
        if np.isnan(value) and self.omits_nan:
            return
        ways_out = ['open_source(..., missing_chunks="fill") accepts that']
        if np.isnan(value):
            ways_out = ['open_source(..., nan_policy="omit") leaves such rows out']
        if column:
            ways_out = ["a dask array, dask.array.from_zarr(PATH), accepts that"]
        raise SourceError(
            f"{self.name} lacks {absent}. zarr reads what is not there as the fill value {value}, without a word. If "
            f"the rows really have that value (zarr does not store such chunks by default), {ways_out[0]}; otherwise "
            f"restore the {absent.unit}s."
        )

    def counted(self, executor: Executor) -> ZarrSource:
        return self

    def blocks(self) -> list[ZarrBlock]:
        return [self.block(*rows) for rows in ranges(self.n_rows, self.block_rows)]

    def chunks(self) -> list[ZarrBlock]:
        return [self.block(*rows) for rows in ranges(self.n_rows, self.grid_rows)]

    def block(self, start: int, stop: int) -> ZarrBlock:
        return ZarrBlock(self.array, self.name, start, stop, packing=self.packing, omits_nan=self.omits_nan)


@uninterrupted()
def require_reachable(array: zarr.Array[Any], name: str) -> None:
    """SourceError where this process does not find the array in its store: zarr would read every row as fill value."""
    try:
        found = zarr.open_array(array.store, path=array.path, mode="r")
        same = _description(found) == _description(array) and found.shape[0] >= array.shape[0]  # rows may have come
    except Exception as error:  # stores raise what their transport raises
        raise SourceError(
            f"{name} cannot be opened on {gethostname()} ({type(error).__name__}), where its rows are to be read. Put "
            "the store where every worker sees it under the same path, or give a URL that all can reach."
        ) from error
    if not same:
        raise SourceError(
            f"{name} on {gethostname()} is another array than the one that was opened: {found.dtype} of shape "
            f"{found.shape} in chunks {found.chunks} instead of {array.dtype} of shape {array.shape} in chunks "
            f"{array.chunks}. Open it anew."
        )


@uninterrupted()
def as_it_is_now(x: Any) -> Any:
    """An open zarr array opened again, for a handle does not see that others have appended; anything else as it is.

    SourceError where it is not there any more.
    """
    if not isinstance(x, zarr.Array):
        return x
    try:
        return zarr.open_array(x.store, path=x.path, mode="r")
    except Exception as error:  # stores raise what their transport raises
        raise SourceError(
            f"{_name_of(x)} cannot be opened again ({type(error).__name__}) to see if it has grown. Give its path, "
            "or a handle of a store that is there."
        ) from error


def _description(array: zarr.Array[Any]) -> tuple[Any, ...]:
    """What must be the same for rows to be the same, whoever opens the array."""
    return array.dtype.newbyteorder("="), array.chunks, array.shards, array.shape[1:], repr(array.fill_value)


@uninterrupted()
def open_zarr(path: str | Path, array: str | None, storage_options: dict[str, Any] | None) -> zarr.Array[Any]:
    """The array at ``path``, or the one named ``array`` in the group there. SourceError where there is none."""
    try:
        node = zarr.open(str(path), mode="r", storage_options=storage_options)
    except Exception as error:  # stores raise what their transport raises
        raise SourceError(
            f"There is no zarr array or group that can be opened at {_without_secrets(str(path))!r} "
            f"({type(error).__name__}). Check the path, and that the store was written by zarr."
        ) from error
    return pick_array(node, array)


@uninterrupted()
def pick_array(node: zarr.Array[Any] | zarr.Group, array: str | None) -> zarr.Array[Any]:
    """The node itself, or its array named ``array``. SourceError lists what a group holds."""
    if isinstance(node, zarr.Array):
        if array is not None:
            raise SourceError(f"{_name_of(node)} is an array, not a group, so array={array!r} names nothing in it.")
        return node
    if array is not None and not isinstance(array, str):
        raise ParameterError(f"array must be the name of an array in the group, but it is {shown(array)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files in the folder that are no part of the group
            held = sorted(name for name, _ in node.arrays())
            found = None if array is None else node.get(array)
    except Exception as error:  # damaged metadata raise whatever comes first
        raise SourceError(
            f"A member of the zarr group cannot be opened ({type(error).__name__}: {error}). Mend or remove what is "
            "damaged there, or open the array by its own path."
        ) from error
    if array is None:
        raise SourceError(
            f"This zarr store is a group of arrays {held}. Say which one with array=NAME, or by its own path."
        )
    if not isinstance(found, zarr.Array):
        raise SourceError(f"The zarr group has no array {array!r}; it holds {held}.")
    return found


def _packed(name: str, packing: Packing, *, column: bool) -> str:
    """Why packed numbers are refused, and the way out."""
    way_out = (
        "Write them unpacked, or give a dask array of the values."
        if column
        else 'Open it with open_source(..., decode="cf") to decode them, or remove the attributes if the stored '
        "numbers are the values."
    )
    return f"{name} holds packed numbers, not values: its attributes are {', '.join(packing.names)}. {way_out}"


def _without_secrets(path: str) -> str:
    """A path as it is; a URL without user, password and query."""
    if "://" not in path:
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _grid(array: zarr.Array[Any]) -> tuple[int, int]:
    """Rows and columns of the unit that is read whole."""
    rows, *columns = array.shards or array.chunks
    return int(rows), int(columns[0]) if columns else 1


def _name_of(array: zarr.Array[Any]) -> str:
    """The last part of the store's path and the array's path in it; never a full path, which may hold a credential."""
    root = getattr(array.store, "root", None)
    parts = [Path(root).name] if root is not None else []
    return "/".join([*parts, *array.path.split("/")]).strip("/") or "the zarr array"
