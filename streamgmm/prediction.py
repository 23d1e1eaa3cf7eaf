"""One result a row: lazy as a dask array with the source's own row chunks, or written to zarr in the same chunks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from streamgmm.kernel import Scorer, scored_tiles
from streamgmm.protocols import Block, Floats, Source


@dataclass(frozen=True)
class RowResult:
    """A result a row: its dtype, and how it follows from responsibilities (k, b) and log densities (b,).

    per_component: whether a row's result has k values or one.
    """

    dtype: np.dtype[Any]
    per_component: bool
    of: Callable[[Floats, Floats], np.ndarray[Any, Any]]


def _labels(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return resp.argmax(axis=0)


def _responsibilities(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return resp.T


def _log_density(resp: Floats, log_density: Floats) -> np.ndarray[Any, Any]:
    return log_density


LABELS = RowResult(np.dtype(np.int64), False, _labels)
RESPONSIBILITIES = RowResult(np.dtype(np.float64), True, _responsibilities)
LOG_DENSITY = RowResult(np.dtype(np.float64), False, _log_density)


def score_block(scorer: Scorer, result: RowResult, block: Block) -> np.ndarray[Any, Any]:
    """The results of one block's rows, (rows,) or (rows, k)."""
    n_rows = block.stop - block.start
    shape = (n_rows, scorer.n_components) if result.per_component else (n_rows,)
    out = np.empty(shape, dtype=result.dtype)
    for tile, resp, log_density in scored_tiles(scorer, block):
        first = tile.row - block.start
        out[first : first + len(log_density)] = result.of(resp, log_density)
    return out


def lazy_rows(scorer: Scorer, result: RowResult, source: Source) -> da.Array:
    """A dask array of the results, one task a row chunk of the source; nothing is read before it is computed."""
    size = source.block_rows if source.in_memory else source.grid_rows
    starts = range(0, source.n_rows, size)
    name = f"predict-{uuid4().hex}"
    tail = (scorer.n_components,) if result.per_component else ()
    graph: dict[Any, Any] = {f"model-{name}": (partial(_itself, scorer),)}
    for i, start in enumerate(starts):
        block = source.block(start, min(start + size, source.n_rows))
        graph[(name, i, *(0 for _ in tail))] = (partial(_score, block=block, result=result), f"model-{name}")
    rows = tuple(min(size, source.n_rows - start) for start in starts)
    return da.Array(graph, name, chunks=(rows, *((n,) for n in tail)), dtype=result.dtype)


def _itself(scorer: Scorer) -> Scorer:
    return scorer


def _score(scorer: Scorer, *, block: Block, result: RowResult) -> np.ndarray[Any, Any]:
    return score_block(scorer, result, block)


@dataclass(frozen=True)
class Totals:
    """Log-likelihood (nats) and weight of some rows; adds."""

    log_likelihood: float
    weight: float

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.log_likelihood + other.log_likelihood, self.weight + other.weight)


def total_block(scorer: Scorer, block: Block) -> Totals:
    """The log-likelihood of one block's rows, weighted."""
    log_likelihood = weight = 0.0
    for tile, _, log_density in scored_tiles(scorer, block):
        weights = np.ones(len(log_density)) if tile.weights is None else tile.weights
        log_likelihood += float(weights @ log_density)
        weight += float(weights.sum())
    return Totals(log_likelihood, weight)


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


class _Target:
    """What tasks write labels to: counts the rows, and once closed takes no more.

    After one task has failed dask leaves the others running; they must not write into what is being removed.
    """

    def __init__(self, array: Any, written: Callable[[int], None]) -> None:
        self._array = array
        self._written = written
        self._gate = Condition()
        self._writing = 0
        self._closed = False

    def __setitem__(self, index: Any, values: Any) -> None:
        with self._gate:
            if self._closed:
                return
            self._writing += 1
        try:
            self._array[index] = values
            self._written(len(values))
        finally:
            with self._gate:
                self._writing -= 1
                self._gate.notify_all()

    def close(self) -> None:
        """Returns when the last write under way has ended."""
        with self._gate:
            self._closed = True
            self._gate.wait_for(lambda: self._writing == 0)


def write_rows(rows: da.Array, path: Path, written: Callable[[int], None]) -> None:
    """Compute lazy rows (n,) into a zarr array with the same row chunks; ``written`` hears of every chunk's rows.

    The chunks of both are alike, so no two tasks touch one. Written beside ``path``, then renamed: what stands there
    is whole.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        array = create_array(temporary, rows.shape, (rows.chunks[0][0],), rows.dtype, fill_value=-1)
        target: Any = _Target(array, written)
        with closing(target):
            da.store(rows, target, lock=False)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; a folder that stood there goes last."""
    old = path.with_name(f".{path.name}.{uuid4().hex}")
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)
