"""One result a row: lazy as a dask array with the source's own row chunks, or written to a zarr array of any grid."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from streamgmm.errors import DataError, DataTypeError, ParameterError
from streamgmm.executors import each_task, executor_for, single_blas_thread
from streamgmm.kernel import Scorer, require_densities, scored_tiles
from streamgmm.protocols import Block, Floats, Source
from streamgmm.sources import DaskSource, require_reachable, uninterrupted


@dataclass(frozen=True)
class RowResult:
    """A result a row: its dtype, and how it follows from responsibilities (k, b) and log densities (b,).

    name: that of its tasks.  per_component: whether a row's result has k values or one.  absent: what stands for a row
    that is left out.
    """

    name: str
    dtype: np.dtype[Any]
    per_component: bool
    absent: float
    of: Callable[[Floats, Floats], np.ndarray[Any, Any]]


def _labels(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return resp.argmax(axis=0)


def _responsibilities(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return resp.T


def _log_density(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return log_density


LABELS = RowResult("predict", np.dtype(np.int64), False, -1, _labels)
RESPONSIBILITIES = RowResult("predict-proba", np.dtype(np.float64), True, np.nan, _responsibilities)
LOG_DENSITY = RowResult("score-samples", np.dtype(np.float64), False, np.nan, _log_density)


def score_block(scorer: Scorer, result: RowResult, block: Block) -> np.ndarray[Any, Any]:
    """The results of one block's rows, (rows,) or (rows, k)."""
    n_rows = block.stop - block.start
    shape = (n_rows, scorer.n_components) if result.per_component else (n_rows,)
    out = np.empty(shape, dtype=result.dtype)
    for tile, resp, log_density in scored_tiles(scorer, block):
        first = tile.row - block.start
        part = out[first : first + len(log_density)]
        part[...] = result.of(resp, log_density)
        if tile.skipped is not None:
            part[tile.skipped] = result.absent
    return out


def lazy_rows(scorer: Scorer, result: RowResult, source: Source) -> da.Array:
    """A dask array of the results, one task a row chunk of the source; nothing is read before it is computed."""
    name = f"{result.name}-{uuid4().hex}"
    model = f"model-{name}"
    tail = (scorer.n_components,) if result.per_component else ()
    graph: dict[Any, Any] = {**source.graph, model: (partial(_itself, scorer),)}
    sizes = []
    for i, block in enumerate(source.chunks()):
        key = (name, i, *(0 for _ in tail))
        graph[key] = (partial(_score, block=block, result=result), model, list(block.needs))
        sizes.append(np.nan if source.uncounted else block.stop - block.start)
    return da.Array(graph, name, chunks=(tuple(sizes), *((n,) for n in tail)), dtype=result.dtype)


def _itself(scorer: Scorer) -> Scorer:
    return scorer


def _score(scorer: Scorer, values: Sequence[Any], *, block: Block, result: RowResult) -> np.ndarray[Any, Any]:
    return score_block(scorer, result, block.opened(values))


@dataclass(frozen=True)
class Totals:
    """Log-likelihood (nats) and weight of some rows; adds."""

    log_likelihood: float
    weight: float

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.log_likelihood + other.log_likelihood, self.weight + other.weight)


def total_block(scorer: Scorer, block: Block) -> Totals:
    """The log-likelihood of one block's rows, weighted. NumericalError for a row whose density overflows."""
    log_likelihood = weight = 0.0
    for tile, _, log_density in scored_tiles(scorer, block):
        require_densities(log_density, block, tile.row)
        weights = np.ones(len(log_density)) if tile.weights is None else tile.weights
        log_likelihood += float(weights @ log_density)
        weight += float(weights.sum())
    return Totals(log_likelihood, weight)


@uninterrupted()
def create_array(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, **options: Any) -> Any:
    """A zarr array of our own: every chunk is written and carries a checksum, so a lost or damaged one is seen."""
    return zarr.create_array(
        str(path),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=ZstdCodec(checksum=True),
        config={"write_empty_chunks": True},
        **options,
    )


def write_rows(
    rows: da.Array,
    target: zarr.Array[Any] | str | Path,
    *,
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
    overwrite: bool = False,
    written: Callable[[int], None] | None = None,
) -> zarr.Array[Any]:
    """Compute lazy results, one a row, into a zarr array in which no two tasks touch the same chunk or shard.

    Parameters
    ----------
    rows : dask array
        (n,) or (n, k), as ``predict``, ``predict_proba`` and ``score_samples`` give for a store or a dask array.
    target : zarr.Array, str or Path
        An open array of the same shape, chunked or sharded in any way, or the path of a new one. A new one is written
        beside its path and then renamed: what stands there is whole. An open one is written in place.
    chunk_rows, shard_rows : int, optional
        Rows of a chunk, and of a shard, of a new array. Default: the row chunks of ``rows``, no shards.
    overwrite : bool
        Replace the zarr array that stands at the path, if it has as many values a row.
    written : callable, optional
        Hears of rows as they are written, where the work runs on this machine.

    Returns
    -------
    zarr.Array
        The target: as it was given, or the new array, open for reading.

    Raises
    ------
    ParameterError
        The target has another shape, takes no such values, or exists already.
    DataError
        ``rows`` has none, or unknown chunk sizes, or a value that does not fit into the target's type.
    DataTypeError
        ``rows`` is no dask array, or the target neither an array nor a path.
    ClusterError, SourceError
        The work could not be done, or a worker does not see the target.
    """
    if not isinstance(rows, da.Array):
        raise DataTypeError(
            f"The rows are a {type(rows).__name__}, not a dask array. What is in memory is written by zarr itself: "
            "zarr.create_array(path, data=rows)."
        )
    if any(np.isnan(size) for size in rows.shape):
        raise DataError("The rows have unknown chunk sizes, so they have no places yet. Call compute_chunk_sizes().")
    if not rows.shape[0]:
        raise DataError("There are 0 rows to write.")
    if isinstance(target, zarr.Array):
        if chunk_rows is not None or shard_rows is not None:
            raise ParameterError("The target is open and has its chunks: leave chunk_rows and shard_rows out.")
        _require_fitting(rows, target)
        _fill(rows, target, written)
        return target
    if not isinstance(target, (str, Path)):
        raise DataTypeError(
            f"The target is a {type(target).__name__}. Give an open zarr array, or the path of a new one."
        )
    if "://" in str(target):
        raise ParameterError(
            f"{target} is a URL, but a new array is written to a folder. Make the array with zarr.create_array, and "
            "give that."
        )
    path = Path(target).resolve()  # workers may stand in another folder; a link stays a link
    if path.exists() and not overwrite:
        raise ParameterError(f"{path} exists already. Set overwrite=True to replace it, or choose another path.")
    if path.exists():
        _require_results(rows, path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        _fill(rows, _new_array(rows, temporary, chunk_rows, shard_rows), written)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _opened(path)


@uninterrupted()
def _opened(path: Path) -> zarr.Array[Any]:
    return zarr.open_array(path, mode="r")


@uninterrupted()
def is_array(path: Path) -> bool:
    """Whether a zarr array stands at ``path``."""
    try:
        return isinstance(zarr.open(str(path), mode="r"), zarr.Array)
    except Exception:  # whatever zarr makes of a folder that is not its own, or broken
        return False


def _require_results(rows: da.Array, path: Path) -> None:
    """ParameterError where what stands at ``path`` is no earlier result of this kind: it might be the data."""
    if not is_array(path):
        raise ParameterError(f"{path} is not a zarr array, so it is not replaced. Choose another path.")
    shape = _opened(path).shape
    if shape[1:] != rows.shape[1:]:
        raise ParameterError(
            f"{path} has shape {shape}, so it holds no results of shape {rows.shape} and is not replaced. Choose "
            "another path, or remove it first."
        )


def _fill(rows: da.Array, target: zarr.Array[Any], written: Callable[[int], None] | None) -> None:
    """Write all rows, a task for each run of whole chunks or shards of the target."""
    unit = int((target.shards or target.chunks)[0])
    step = unit * max(1, round(max(rows.chunks[0]) / unit))
    source = replace(
        DaskSource.of(rows.rechunk((step, *rows.shape[1:])), column=rows.ndim == 1),
        travels=not isinstance(target.store, MemoryStore),
    )

    heard = 0

    def finished(task: str) -> None:
        nonlocal heard
        if written is not None and task.startswith("writeblock"):
            written(min(step, source.n_rows - heard))
            heard += step

    with single_blas_thread(), executor_for(source) as executor, each_task(finished):
        executor.everywhere([partial(require_reachable, target, "the target")])
        executor.map_reduce(write_block, target, source.blocks(), source.graph)
    if written is not None and heard < source.n_rows:  # a single block, or a cluster: not one of dask's tasks here
        written(source.n_rows - heard)


def write_block(target: zarr.Array[Any], block: Block) -> int:
    """Write one block's rows to their place in the target; returns how many."""
    require_reachable(target, "the target")  # it is gone where the work was given up
    for piece in block.pieces():
        with np.errstate(over="ignore"):
            values = piece.rows.astype(target.dtype)
        whole = target.dtype.kind in "biu" or piece.rows.dtype.kind in "iu"
        changed = values != piece.rows if whole else np.isinf(values) & np.isfinite(piece.rows)
        if changed.any():
            row = int(np.flatnonzero(changed.reshape(len(values), -1).any(axis=1))[0])
            raise DataError(
                f"The result of row {block.start + row} is {piece.rows[row]}, which {target.dtype} cannot hold. Give "
                "a target of a wider type."
            )
        with uninterrupted():
            target[block.start : block.start + len(values)] = values
    return block.stop - block.start


def _new_array(rows: da.Array, path: Path, chunk_rows: int | None, shard_rows: int | None) -> zarr.Array[Any]:
    """An empty array for the rows. ParameterError where a shard is not made of whole chunks."""
    for name, value in (("chunk_rows", chunk_rows), ("shard_rows", shard_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ParameterError(f"{name} must be a positive whole number of rows, but it is {value!r}.")
    chunk = int(chunk_rows or max(rows.chunks[0]))
    if shard_rows is not None and shard_rows % chunk:
        raise ParameterError(f"shard_rows={shard_rows} is not a multiple of the {chunk} rows of a chunk.")
    tail = rows.shape[1:]
    shards = None if shard_rows is None else (shard_rows, *tail)
    fill_value = {"f": np.nan, "i": -1}.get(rows.dtype.kind, 0)
    return create_array(path, rows.shape, (chunk, *tail), rows.dtype, shards=shards, fill_value=fill_value)


def _require_fitting(rows: da.Array, target: zarr.Array[Any]) -> None:
    if target.read_only:
        raise ParameterError("The target is open for reading only. Open it with mode='r+'.")
    if target.shape != rows.shape:
        raise ParameterError(f"The target has shape {target.shape}, but the rows have {rows.shape}.")
    # whether each whole number fits is seen when it is there
    whole = rows.dtype.kind in "iu" and target.dtype.kind in "iu"
    if target.dtype.kind not in "biuf" or not (whole or np.can_cast(rows.dtype, target.dtype, "same_kind")):
        raise ParameterError(f"The target holds {target.dtype}, which cannot take values of {rows.dtype}.")


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; a folder that stood there goes last."""
    old = path.with_name(f".{path.name}.{uuid4().hex}")
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)
