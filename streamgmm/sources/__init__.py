"""Where rows come from: one door for every kind of store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr

from streamgmm.errors import DataError, DataTypeError, ParameterError, shown
from streamgmm.protocols import Source
from streamgmm.sources.dask_array import DaskSource
from streamgmm.sources.dtypes import require_unmasked
from streamgmm.sources.growing import look, place_key, rows_written
from streamgmm.sources.interrupts import uninterrupted
from streamgmm.sources.memory import MemorySource
from streamgmm.sources.weighted import WeightedSource, checked_weights
from streamgmm.sources.zarr_array import Reading, ZarrSource, as_it_is_now, open_zarr, pick_array, require_reachable

__all__ = [
    "DaskSource",
    "WeightedSource",
    "ZarrSource",
    "as_it_is_now",
    "is_lazy",
    "is_store",
    "look",
    "open_source",
    "place_key",
    "require_reachable",
    "require_unmasked",
    "rows_written",
    "stamps_of",
    "stored",
    "uninterrupted",
    "with_weights",
]


def is_lazy(x: Any) -> bool:
    """Whether ``x`` is a dask collection, or holds one: rows that asking for would load as a whole."""
    items = x if isinstance(x, (list, tuple)) else (x,)
    graphs = (getattr(item, "__dask_graph__", None) for item in items)
    return any(callable(graph) and graph() is not None for graph in graphs)


def is_store(x: Any) -> bool:
    """Whether ``x`` is to be opened where the work runs, rather than an array-like in memory."""
    return isinstance(x, (str, Path, zarr.Array, zarr.Group, da.Array)) or _is_source(x)


def open_source(
    x: Any,
    *,
    array: str | None = None,
    storage_options: dict[str, Any] | None = None,
    nan_policy: str = "raise",
    missing_chunks: str = "refuse",
    decode: str = "refuse",
    block_rows: int | None = None,
) -> Source:
    """Open anything that holds rows, without reading them.

    Parameters
    ----------
    x : str, Path, zarr.Array, zarr.Group, dask.array.Array, numpy.ndarray, numpy.memmap or Source
        Rows (n, d): a zarr store by its path or URL, an open zarr array, a group with ``array``, a dask array, or an
        array in memory. A source comes back as it is.
    array : str, optional
        Name of the array in a zarr group.
    storage_options : dict, optional
        What fsspec needs to reach a URL.
    nan_policy : {"raise", "omit"}
        What to do with a row that has NaN in any feature: refuse it with its place, or leave it out. Rows left out are
        counted in ``n_skipped_``; their label is -1, their responsibilities and log density NaN. An infinity is
        refused always.
    missing_chunks : {"refuse", "fill", "wait"}
        What to do with chunks that a zarr store does not hold, and shards of zero length, which zarr reads as the
        fill value: refuse the store, naming the chunks and their rows, or accept the fill value. Where that is NaN,
        ``nan_policy="omit"`` accepts it too: they are rows to leave out. zarr itself does not store a chunk that holds
        nothing but the fill value, unless told to. A chunk that is absent inside a shard is not seen by this.
        "wait" is for ``update``, which learns the rows before the first chunk that is not there yet; everything else
        takes it as "refuse".
    decode : {"refuse", "cf"}
        What to do with a zarr array whose attributes say that its numbers are packed by the CF conventions
        (scale_factor, add_offset, _FillValue, missing_value): refuse it, or decode it. Then values are stored numbers
        * scale_factor + add_offset, and NaN where the stored number is _FillValue or missing_value.
    block_rows : int, optional
        Rows of a canonical block. Fits with the same rows and the same blocks give the same bits. Default: the
        multiple of the store's shard or chunk rows nearest to 32 MiB of float64 (2 MiB for rows in memory). The
        blocks of a dask array are its row chunks.

    Raises
    ------
    SourceError
        There is nothing to open, the group has no such array, or chunks are missing.
    DataError, DataTypeError
        What is there is not (n, d), not real numbers, or packed.
    ParameterError
        An option is unknown, or describes something else than ``x``.
    """
    said = {"nan_policy": nan_policy, "missing_chunks": missing_chunks, "decode": decode}
    for name, value in said.items():
        _require_choice(name, value)
    omits_nan, decodes = nan_policy == "omit", decode == "cf"
    if isinstance(x, (str, Path, zarr.Array, zarr.Group)):
        reading = Reading(omits_nan, missing_chunks == "fill", decodes, missing_chunks == "wait")
        if isinstance(x, (str, Path)):
            return ZarrSource.of(open_zarr(x, array, storage_options), block_rows, reading=reading)
        if storage_options is not None:
            raise ParameterError("storage_options say how a URL is reached, but the store given is open already.")
        return ZarrSource.of(pick_array(x, array), block_rows, reading=reading)
    if array is not None or storage_options is not None or missing_chunks != "refuse" or decodes:
        raise ParameterError(
            "array, storage_options, missing_chunks and decode describe a zarr store, but the rows given are not in "
            "one."
        )
    if isinstance(x, da.Array):
        return DaskSource.of(x, block_rows, omits_nan=omits_nan)
    if isinstance(x, np.ndarray):
        require_unmasked(x, "the array")
        return MemorySource.of(x, block_rows, omits_nan=omits_nan)
    if _is_source(x):
        if block_rows is not None or omits_nan:
            raise ParameterError("This source is open already; say block_rows and nan_policy where it is opened.")
        source: Source = x
        return source
    if is_lazy(x):
        raise DataTypeError(
            f"Rows cannot be read from a dask {type(x).__name__}, and it is not loaded into memory behind your back. "
            "Give one dask array: X.to_dask_array() of a data frame, X.data of an xarray object, "
            "dask.array.concatenate(X) of a list."
        )
    raise DataTypeError(
        f"Rows cannot be read from a {type(x).__name__}. Give a path to a zarr store, a zarr array, a zarr group with "
        "array=NAME, a dask array, or a numpy array (X.to_numpy() of a data frame)."
    )


#: The choices of open_source that describe rows; the careful one, which is the default, comes first.
CHOICES = {"nan_policy": ("raise", "omit"), "missing_chunks": ("refuse", "fill", "wait"), "decode": ("refuse", "cf")}


def _require_choice(name: str, value: Any) -> None:
    """ParameterError where ``value`` is none of the choices."""
    *first, last = map(repr, CHOICES[name])
    if not isinstance(value, str) or value not in CHOICES[name]:
        raise ParameterError(f"{name} must be {', '.join(first)} or {last}, but it is {shown(value)}.")


def with_weights(source: Source, sample_weight: Any) -> Source:
    """``source`` with a weight for each row: finite, at least zero. None leaves it as it is.

    sample_weight: (n,), a zarr array or the path of one, a dask array, or array-like; aligned by row number, whatever
    its chunks. Raises DataError where there are more or fewer weights than rows, or one of an array in memory is
    negative, NaN or infinite; weights that lie elsewhere are looked at as they are read.
    """
    if sample_weight is None:
        return source
    weighted = WeightedSource(source, _open_weights(sample_weight, source))
    if not weighted.uncounted:
        weighted.require_lengths()
    return weighted


def stored(source: Source) -> ZarrSource | None:
    """The zarr array that the rows of a source lie in; None where they come from elsewhere."""
    rows = source.source if isinstance(source, WeightedSource) else source
    return rows if isinstance(rows, ZarrSource) else None


def stamps_of(source: Source) -> list[list[int]]:
    """Size and time of the chunks of each zarr array that a source reads, as ``Written.stamp``; empty without any."""
    parts = (source.source, source.weights) if isinstance(source, WeightedSource) else (source,)
    arrays = [part for part in parts if isinstance(part, ZarrSource)]
    return [list(look(part.array).stamp(0, part.n_rows)) for part in arrays]


def _open_weights(sample_weight: Any, source: Source) -> Source:
    if isinstance(sample_weight, (str, Path)):
        sample_weight = open_zarr(sample_weight, None, None)
    if isinstance(sample_weight, zarr.Array):
        return ZarrSource.of(sample_weight, column=True)
    if isinstance(sample_weight, da.Array):
        return DaskSource.of(sample_weight, name="sample_weight", column=True, fused=False)
    if is_lazy(sample_weight):
        raise DataTypeError(f"sample_weight is a dask {type(sample_weight).__name__}. Give a dask array of its values.")
    require_unmasked(sample_weight, "sample_weight")
    try:
        weights = np.asarray(sample_weight)
        if weights.dtype.kind in "cmM":
            raise DataTypeError(
                f"sample_weight holds values of type {weights.dtype}, but weights must be real numbers."
            )
        weights = weights.astype(np.float64, copy=False)
    except DataTypeError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"sample_weight must be numbers, one a row: {error}.") from error
    if weights.ndim != 1 or not len(weights):
        raise DataError(
            f"sample_weight has shape {weights.shape}, but one weight for each row of {source.name} is expected: (n,)."
        )
    checked_weights(weights)
    return MemorySource.of(weights, column=True)


def _is_source(x: Any) -> bool:
    # asked of the type: what is lazy claims to have any attribute, and rows that nobody has counted have no number
    return all(callable(getattr(type(x), name, None)) for name in ("blocks", "chunks", "block", "counted"))
