"""Starting parameters from the sample: by splits, from clusters, or at random; and the best of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.errors import NumericalError
from streamgmm.history import PassRecord
from streamgmm.params import MixtureParams
from streamgmm.partition import (
    Cluster,
    draw,
    kmeans,
    kmeans_once,
    log_det_within,
    metrics,
    nearest_to_random_rows,
    one_hot,
    quantised,
    random_rows,
    require_distinct,
)
from streamgmm.protocols import Floats
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import anderson
from streamgmm.solvers.em import FitResult
from streamgmm.split import grown, in_units
from streamgmm.streams import Purpose, stream

#: Rows for each free parameter that starts are sought on, and at least; the best of them goes on with all.
START_ROWS, FEWEST_START_ROWS = 30, 10_000
#: Fewer rows for each free parameter than this are few.
FEW_ROWS = 10
#: Rows that are so many times as far from the middle as all others are far.
FARTHER = 4.0
#: EM on the sample ends where it gains less than this, nats a row: it costs no read.
CONVERGED, MOST_STEPS = 1e-9, 800
#: Rows of each component of a start from few rows.
ROWS_EACH = 5


def find_start(
    name: str, sample: Sample, structure: type[AbstractCovariance], k: int, seed: int, index: int, reg_covar: float
) -> MixtureParams:
    """A start of the kind ``name`` (``init_params``), in the data's units and in canonical order.

    index: which restart this is. Raises DataError where the sample has fewer than k distinct rows.
    """
    d = sample.rows.shape[1]
    p = structure.n_parameters(k, d) + k * d + k - 1
    sample = start_part(sample, p)
    if name == "auto":
        name = _first_choice(sample, structure, p) if index == 0 else "k-means++"
    z = (sample.rows - sample.frame.shift) * sample.frame.scale
    if name == "split":
        require_distinct(z, sample.row_weights, k)
        try:
            return grown(sample, structure, k, reg_covar).canonical()
        except NumericalError:  # clusters have moments even where nothing can be split
            name = "k-means++"
    # in the order of their values a row of weight two is drawn where two rows would be, whatever came first
    order = np.lexsort(z.T[::-1])
    rng = stream(seed, Purpose.STARTS, index)
    weights, means, covariances = MOMENTS[name](z[order], sample.row_weights[order], k, rng, structure)
    return in_units(weights, means, covariances, structure, sample.frame).canonical()


def start_rows(n_parameters: int) -> int:
    """Rows of the sample that starts are sought on."""
    return max(START_ROWS * n_parameters, FEWEST_START_ROWS)


def _first_choice(sample: Sample, structure: type[AbstractCovariance], n_parameters: int) -> str:
    """ "split", but where halves of a component cannot show what they gain.

    That is so where one covariance fits all components, most of them still unsplit, and where few rows make many
    parameters, so that any halves fit well.
    """
    return "kmeans" if structure.shared or len(sample) < FEW_ROWS * n_parameters else "split"


def start_part(sample: Sample, n_parameters: int) -> Sample:
    """The part of the sample that starts are sought on: all of it where some of its rows are farther than that tells.

    A row far from all others may need a component of its own; without one it spoils a covariance that all share.
    """
    part = sample.part(start_rows(n_parameters))
    if part is sample:
        return sample
    reach, whole = (np.abs((of.rows - sample.frame.shift) * sample.frame.scale).max(axis=0) for of in (part, sample))
    return sample if (whole > FARTHER * reach).any() else part


# -- the moments of a start ------------------------------------------------------------------------------------------

#: Weights (k,), means (k, d) and covariances (k, d, d), in z.
Moments = tuple[Floats, Floats, Floats]


def _of_clusters(
    cluster: Cluster, z: Floats, weights: Floats, k: int, rng: np.random.Generator, structure: type[AbstractCovariance]
) -> Moments:
    """The moments of clusters that are sought in one metric or two, of which the tighter partition is kept."""
    # the sample's own covariance: that of all rows may be made by one far row that is not in it
    covariance = np.atleast_2d(np.cov(z.T, aweights=weights, bias=True))
    maps = metrics(covariance, isotropic=structure.isotropic)
    partitions = [cluster(z @ metric, weights, k, rng) for metric in maps]
    labels = min(partitions, key=lambda labels: log_det_within(z, weights, labels, k))
    return _moments(z, one_hot(labels, k) * weights)


def _at_random(z: Floats, weights: Floats, k: int, rng: np.random.Generator, structure: Any) -> Moments:
    """The moments under random responsibilities."""
    resp = rng.random((k, len(z)))
    return _moments(z, resp / resp.sum(axis=0) * weights)


def _of_few_rows(z: Floats, weights: Floats, k: int, rng: np.random.Generator, structure: Any) -> Moments:
    """Equal weights, and the means and variances of a few random rows each, as Spark does.

    A feature in which they are alike takes the variance of all rows.
    """
    firsts = np.array(random_rows(z, weights, k, rng))[:, None]
    rows = z[np.concatenate([firsts, draw(weights, k * (ROWS_EACH - 1), rng).reshape(k, -1)], axis=1)]
    whole = np.average((z - np.average(z, axis=0, weights=weights)) ** 2, axis=0, weights=weights)
    variances = rows.var(axis=1)
    variances = np.where(variances > 1e-12 * whole, variances, np.where(whole > 0, whole, 1.0))
    return np.full(k, 1.0 / k), rows.mean(axis=1), variances[:, :, None] * np.eye(z.shape[1])


def _moments(z: Floats, resp: Floats) -> tuple[Floats, Floats, Floats]:
    """Weights (k,), means (k, d) and covariances (k, d, d) of rows that belong to components by ``resp`` (k, m).

    A covariance is drawn towards a sphere of its own size as if by d + 2 further rows, so that a cluster of few rows
    has one too; a cluster without any spread takes a share of the whole data's.
    """
    d = z.shape[1]
    mass, weights = resp.sum(axis=1), resp.sum(axis=0)
    means = resp @ z / mass[:, None]
    covariances = np.empty((len(resp), d, d))
    whole = float(np.average(((z - z.mean(axis=0)) ** 2).mean(axis=1), weights=weights))
    prior = d + 2.0
    for j, share in enumerate(resp):
        rows = share > 0
        centred = z[rows] - means[j]
        scatter = (centred.T * share[rows]) @ centred
        size = np.trace(scatter) / (d * mass[j]) or whole * len(resp) ** (-2.0 / d) or 1.0
        covariances[j] = (scatter + prior * size * np.eye(d)) / (mass[j] + prior)
    return mass / mass.sum(), means, covariances


#: Ways to the moments of a start, by the name that ``init_params`` gives them.
MOMENTS: dict[str, Callable[[Floats, Floats, int, np.random.Generator, type[AbstractCovariance]], Moments]] = {
    "kmeans": partial(_of_clusters, kmeans),
    "k-means++": partial(_of_clusters, kmeans_once),
    "vq": partial(_of_clusters, quantised),
    "random_from_data": partial(_of_clusters, nearest_to_random_rows),
    "random": _at_random,
    "samples": _of_few_rows,
}


# -- the best of some ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """The best of several starts, after EM on the sample. index: which one.  n_steps: EM steps, of all of them.

    result: of the last run of EM, whose params are the mixture and whose bounds are those of the sample's rows.
    """

    result: FitResult
    index: int
    n_steps: int

    @property
    def params(self) -> MixtureParams:
        return self.result.params

    @property
    def log_likelihood(self) -> float:
        """Nats a row of the sample."""
        return self.result.lower_bound

    def canonical(self) -> Found:
        """With its components in canonical order."""
        order = self.params.canonical_order()
        stats = self.result.stats
        result = replace(
            self.result,
            params=self.params.reordered(order),
            stats=None if stats is None else stats.reordered(order),
            starved=tuple(int(np.flatnonzero(order == j)[0]) for j in self.result.starved),
        )
        return replace(self, result=result)

    def record(self, predicted_gap: float) -> PassRecord:
        """The sample as pass 0 of a history. predicted_gap: what it lacks for want of the other rows."""
        return PassRecord(
            iteration=0,
            restart=self.index,
            log_likelihood=self.log_likelihood,
            change=nan,
            converged=False,
            measure="log-likelihood on the sample",
            predicted_gap=predicted_gap,
            inner_steps=self.n_steps,
        )


def best_start(
    sample: Sample,
    starts: Sequence[MixtureParams],
    reg_covar: float,
    tol: float = CONVERGED,
    most_steps: int = MOST_STEPS,
) -> Found:
    """Every start followed to its optimum on a part of the sample, and the best one on to that of the whole.

    tol, most_steps: of EM, which ends where two steps gain less, nats a row.
    All are followed to the end: a ranking after a few steps loses part of what many starts gain. One that degenerates
    is given up; NumericalError where none is left.
    """
    part = start_part(sample, starts[0].n_parameters)
    runs, failures = _followed(part, dict(enumerate(starts)), reg_covar, tol, most_steps)
    n_steps = sum(run.n_passes for run in runs.values())
    for index in sorted(runs, key=lambda index: -runs[index].lower_bound):
        if part is sample:
            return Found(runs[index], index, n_steps)
        whole, failed = _followed(sample, {index: runs[index].params}, reg_covar, tol, most_steps)
        if whole:
            return Found(whole[index], index, n_steps + whole[index].n_passes)
        failures += failed
    raise failures[0]


def _followed(
    sample: Sample, starts: Mapping[int, MixtureParams], reg_covar: float, tol: float, most_steps: int
) -> tuple[dict[int, FitResult], list[NumericalError]]:
    """Where EM ends from each of the starts, by their numbers, and what came of those that degenerated."""
    runs, failures = {}, []
    for index, start in starts.items():
        try:
            runs[index] = anderson(sample.read, start, tol=tol, max_iter=most_steps, reg_covar=reg_covar)
        except NumericalError as error:
            failures.append(error)
    return runs, failures
