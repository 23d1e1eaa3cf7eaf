"""Samples in memory, all rows or some, for tests of what is learned on them."""

from __future__ import annotations

import numpy as np

from streamgmm.executors import SerialExecutor
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
from streamgmm.stats import Frame

#: reg_covar so small that it does not matter.
REG = 1e-9


def whole(rows: np.ndarray, weights: np.ndarray | None = None) -> Sample:
    """All rows, as a sample that leaves none out."""
    return part(rows, len(rows), weights)


def part(rows: np.ndarray, n_rows: int, weights: np.ndarray | None = None) -> Sample:
    d = rows.shape[1]
    frame = Frame(np.median(rows, axis=0), np.full(d, 0.5))
    weights = np.ones(len(rows)) if weights is None else weights
    return Sample.of(rows, weights, frame, SerialExecutor(), 0, n_rows, complete=len(rows) == n_rows)


def moved(params: MixtureParams, rng: np.random.Generator, size: float) -> MixtureParams:
    """A mixture near another one."""
    weights = params.weights * np.exp(size * rng.standard_normal(len(params.weights)))
    values = params.covariance.values * np.exp(size * rng.standard_normal())
    means = params.means + size * rng.standard_normal(params.means.shape)
    return MixtureParams(weights / weights.sum(), means, type(params.covariance)(values))


def mean_log_likelihood(sample: Sample, params: MixtureParams) -> float:
    stats = sample.read(params)
    return stats.log_likelihood / stats.weight
