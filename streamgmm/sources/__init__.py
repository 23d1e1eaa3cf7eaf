"""Where rows come from: one door for every kind of store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from streamgmm.errors import DataTypeError, ParameterError
from streamgmm.protocols import Source
from streamgmm.sources.memory import MemorySource
from streamgmm.sources.weighted import with_weights
from streamgmm.sources.zarr_array import ZarrSource, open_zarr, pick_array

__all__ = ["is_lazy", "is_store", "open_source", "with_weights"]


def is_lazy(x: Any) -> bool:
    """Whether ``x`` is a dask collection, or holds one: rows that asking for would load as a whole."""
    graph = getattr(x, "__dask_graph__", None)
    return callable(graph) and graph() is not None


def is_store(x: Any) -> bool:
    """Whether ``x`` names or is a store, or is a source already, rather than an array-like in memory."""
    return isinstance(x, (str, Path, zarr.Array, zarr.Group)) or _is_source(x)


def open_source(
    x: Any,
    *,
    array: str | None = None,
    storage_options: dict[str, Any] | None = None,
    block_rows: int | None = None,
) -> Source:
    """Open anything that holds rows, without reading them.

    Parameters
    ----------
    x : str, Path, zarr.Array, zarr.Group, numpy.ndarray, numpy.memmap or Source
        Rows (n, d): a zarr store by its path or URL, an open zarr array, a group with ``array``, or an array in
        memory. A source comes back as it is.
    array : str, optional
        Name of the array in a zarr group.
    storage_options : dict, optional
        What fsspec needs to reach a URL.
    block_rows : int, optional
        Rows of a canonical block. Fits with the same rows and the same blocks give the same bits. Default: the
        multiple of the store's shard or chunk rows nearest to 32 MiB of float64 (2 MiB for rows in memory).

    Raises
    ------
    SourceError
        There is nothing to open, or the group has no such array.
    DataError, DataTypeError
        What is there is not (n, d), or not real numbers.
    """
    if isinstance(x, (str, Path)):
        return ZarrSource.of(open_zarr(x, array, storage_options), block_rows)
    if isinstance(x, (zarr.Array, zarr.Group)):
        return ZarrSource.of(pick_array(x, array), block_rows)
    if array is not None or storage_options is not None:
        raise ParameterError("array and storage_options describe a zarr store, but the rows given are not in one.")
    if isinstance(x, np.ndarray):
        return MemorySource.of(x, block_rows)
    if _is_source(x):
        if block_rows is not None:
            raise ParameterError("This source is open already; say block_rows where it is opened.")
        source: Source = x
        return source
    raise DataTypeError(
        f"Rows cannot be read from a {type(x).__name__}. Give a path to a zarr store, a zarr array, a zarr group with "
        "array=NAME, or a numpy array."
    )


def _is_source(x: Any) -> bool:
    return all(hasattr(x, name) for name in ("n_rows", "n_features", "block_rows", "block"))
