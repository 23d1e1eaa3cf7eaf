"""Starting parameters from the sample: the moments of clusters, of the rows nearest to seeds, or at random."""

from __future__ import annotations

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.errors import DataError
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot
from streamgmm.protocols import Floats, Integers
from streamgmm.streams import Purpose, stream

LLOYD_ITERATIONS = 100
#: Lloyd stops where an iteration lowers the inertia by less than this part; EM goes on from there anyway.
LLOYD_TOL = 1e-4


def find_start(
    name: str, pilot: Pilot, structure: type[AbstractCovariance], k: int, seed: int, index: int
) -> MixtureParams:
    """A start of the kind ``name`` (``init_params``), in canonical order. index: which restart this is.

    Raises DataError where the sample has fewer than k distinct rows.
    """
    frame = pilot.frame(isotropic=structure.isotropic)
    z = (pilot.sample - frame.shift) * frame.scale
    rng = stream(seed, Purpose.STARTS, index)
    if name == "random":
        resp = rng.random((k, len(z)))
        resp /= resp.sum(axis=0)
    else:
        # the sample's own covariance: that of all rows may be made by one far row that is not in it
        covariance = np.atleast_2d(np.cov(z.T, aweights=pilot.sample_weights, bias=True))
        metrics = _metrics(covariance, isotropic=structure.isotropic)
        cluster = PARTITIONS[name]
        partitions = [cluster(z @ metric, pilot.sample_weights, k, rng) for metric in metrics]
        labels = min(partitions, key=lambda labels: _log_det_within(z, pilot.sample_weights, labels, k))
        resp = _one_hot(labels, k)
    weights, means, covariances = _moments(z, resp * pilot.sample_weights)
    mixture = structure.from_dense(covariances, weights).scaled(1.0 / frame.scale)
    return MixtureParams(weights, frame.shift + means / frame.scale, mixture).canonical()


def _metrics(covariance: Floats, *, isotropic: bool) -> tuple[Floats, ...]:
    """Linear maps of z to the coordinates in which clusters are sought.

    Whitened: unit variance in every direction, so that elongated data are no obstacle (directions without variance
    fall away). Along the axes: unit variance of each feature, where clusters in many features stay farther apart than
    in whitened coordinates, which shrink just the directions in which they differ. Isotropic: the data's own metric.
    """
    if isotropic:
        return (np.eye(len(covariance)),)
    variances, directions = np.linalg.eigh(covariance)
    keep = variances > 1e-12 * variances.max(initial=0.0)
    deviations = np.sqrt(np.diagonal(covariance))
    along_axes = np.diag(1.0 / np.where(deviations > 0, deviations, 1.0))
    return directions[:, keep] / np.sqrt(variances[keep]), along_axes


def _log_det_within(z: Floats, weights: Floats, labels: Integers, k: int) -> float:
    """log |pooled within-cluster scatter|, the same ranking in all linear coordinates (Friedman & Rubin 1967)."""
    mass, sums = _sums(z, weights, labels, k)
    centred = z - (sums / mass[:, None])[labels]
    variances = np.linalg.eigvalsh((centred.T * weights) @ centred / weights.sum())
    return float(np.log(np.maximum(variances, 1e-12)).sum())


def kmeans(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of the best of several greedy k-means++ starts (Arthur & Vassilvitskii 2007), each followed by Lloyd.

    y: (m, d) rows. weights: (m,). Raises DataError where there are fewer than k distinct rows of positive weight.
    """
    runs = [_lloyd(y, weights, y[_greedy_seeds(y, weights, k, rng)]) for _ in range(kmeans_runs(k))]
    return min(runs, key=lambda run: run[1])[0]


def nearest_to_seeds(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of the nearest of k rows that greedy k-means++ chose. DataError as in ``kmeans``."""
    return _nearest(y, _greedy_seeds(y, weights, k, rng))


def nearest_to_random_rows(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of the nearest of k distinct rows, drawn in proportion to weight. DataError as in ``kmeans``."""
    chosen: list[int] = []
    nearest = np.full(len(y), np.inf)
    for found in range(k):
        masses = np.where(nearest > 0, weights, 0.0)
        if not masses.sum() > 0:
            raise _too_few_distinct(found, y, k)
        chosen.append(int(_draw(masses, 1, rng)[0]))
        nearest = np.minimum(nearest, ((y - y[chosen[-1]]) ** 2).sum(axis=1))
    return _nearest(y, chosen)


def _nearest(y: Floats, seeds: list[int]) -> Integers:
    """The nearest of the rows ``seeds`` to each row, and each of them to itself."""
    labels = np.asarray(_squared_distances(y, y[seeds]).argmin(axis=1))
    labels[seeds] = np.arange(len(seeds))  # rounding may place two close ones both at one
    return labels


def kmeans_runs(k: int) -> int:
    """Runs in each metric. Few clusters are cheap to seek and easily sought wrongly: one run then finds two in one."""
    return 1 if k == 1 else min(8, max(2, 24 // k))


def _greedy_seeds(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> list[int]:
    """Numbers of k rows, each the best of 2 + log k candidates drawn in proportion to squared distance."""
    n_trials = 2 + int(np.log(k))
    chosen = [int(_draw(weights, 1, rng)[0])]
    nearest = _squared_distances(y, y[chosen])[:, 0]
    for found in range(1, k):
        potential = weights * nearest
        if not potential.sum() > 0:
            raise _too_few_distinct(found, y, k)
        trials = _draw(potential, n_trials, rng)
        remaining = np.minimum(nearest[:, None], _squared_distances(y, y[trials]))
        best = int(np.argmin(weights @ remaining))
        nearest = remaining[:, best]
        chosen.append(int(trials[best]))
        nearest[chosen] = 0.0  # distances by expansion leave a rounding error where they should be zero
    return chosen


def _too_few_distinct(found: int, y: Floats, k: int) -> DataError:
    return DataError(
        f"Only {found} distinct rows were found among the {len(y)} sampled, but n_components={k}. A mixture cannot "
        "have more components than distinct rows: lower n_components."
    )


def _draw(masses: Floats, size: int, rng: np.random.Generator) -> Integers:
    cumulated = np.cumsum(masses)
    return np.minimum(np.searchsorted(cumulated, rng.random(size) * cumulated[-1], side="right"), len(masses) - 1)


def _lloyd(y: Floats, weights: Floats, centres: Floats) -> tuple[Integers, float]:
    """Labels and inertia after Lloyd's iterations; a cluster that loses its rows takes the farthest row."""
    inertia = np.inf
    for _ in range(LLOYD_ITERATIONS):
        distances = _squared_distances(y, centres)
        labels = distances.argmin(axis=1)
        nearest = distances[np.arange(len(y)), labels]
        for empty in np.setdiff1d(np.arange(len(centres)), labels[weights > 0]):
            farthest = int(np.argmax(weights * nearest))
            labels[farthest], nearest[farthest] = empty, 0.0
        before, inertia = inertia, float(weights @ nearest)
        if inertia >= (1.0 - LLOYD_TOL) * before:
            break
        mass, sums = _sums(y, weights, labels, len(centres))
        centres = sums / mass[:, None]
    return labels, inertia


def _squared_distances(y: Floats, centres: Floats) -> Floats:
    """(m, c) squared distances by expansion, never below zero."""
    lengths = np.einsum("id,id->i", y, y)[:, None] + np.einsum("id,id->i", centres, centres)
    return np.maximum(lengths - 2.0 * (y @ centres.T), 0.0)


def _sums(y: Floats, weights: Floats, labels: Integers, k: int) -> tuple[Floats, Floats]:
    """Weight (k,) and weighted sum (k, d) of each cluster."""
    resp = _one_hot(labels, k) * weights
    return resp.sum(axis=1), resp @ y


def _one_hot(labels: Integers, k: int) -> Floats:
    """(k, m) ones where a row has that label."""
    resp = np.zeros((k, len(labels)))
    resp[labels, np.arange(len(labels))] = 1.0
    return resp


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


#: Ways to cut the sample into k clusters, by the name that ``init_params`` gives them.
PARTITIONS = {
    "auto": kmeans,
    "kmeans": kmeans,
    "k-means++": nearest_to_seeds,
    "random_from_data": nearest_to_random_rows,
}
