"""One result a row: the kernel over any source, lazy as a dask array with the source's own row chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np

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
