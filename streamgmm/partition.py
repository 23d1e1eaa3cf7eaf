"""Ways to cut rows in memory into clusters: labels, from which a start takes its moments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Floats, Integers

#: Labels (m,) of rows (m, d) of some weights (m,), in k clusters.
Cluster = Callable[[Floats, Floats, int, np.random.Generator], Integers]

LLOYD_ITERATIONS = 100
#: Lloyd stops where an iteration lowers the inertia by less than this part; EM goes on from there anyway.
LLOYD_TOL = 1e-4
#: Half the way between the two codes that take the place of one, in deviations along the cell's principal axis.
CODE_OFFSET = 0.5


def metrics(covariance: Floats, *, isotropic: bool) -> tuple[Floats, ...]:
    """Linear maps of rows of that covariance (d, d) to the coordinates in which clusters are sought.

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


def log_det_within(z: Floats, weights: Floats, labels: Integers, k: int) -> float:
    """log |pooled within-cluster scatter|, the same ranking in all linear coordinates (Friedman & Rubin 1967)."""
    mass, sums = _sums(z, weights, labels, k)
    centred = z - (sums / mass[:, None])[labels]
    variances = np.linalg.eigvalsh((centred.T * weights) @ centred / weights.sum())
    return float(np.log(np.maximum(variances, 1e-12)).sum())


# -- k-means -------------------------------------------------------------------------------------------------------


def kmeans(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of the best of several runs of ``kmeans_once``: that of the least inertia.

    y: (m, d) rows. weights: (m,). Raises DataError where there are fewer than k distinct rows of positive weight.
    """
    runs = [_seeded(y, weights, k, rng) for _ in range(kmeans_runs(k))]
    return min(runs, key=lambda run: run[1])[0]


def kmeans_once(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of greedy k-means++ seeds (Arthur & Vassilvitskii 2007) after Lloyd. DataError as in ``kmeans``."""
    return _seeded(y, weights, k, rng)[0]


def kmeans_runs(k: int) -> int:
    """Runs in each metric. Few clusters are cheap to seek and easily sought wrongly: one run then finds two in one."""
    return 1 if k == 1 else min(8, max(2, 24 // k))


def _seeded(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> tuple[Integers, float]:
    return _lloyd(y, weights, y[_greedy_seeds(y, weights, k, rng)])


def _greedy_seeds(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> list[int]:
    """Numbers of k rows, each the best of 2 + log k candidates drawn in proportion to squared distance."""
    n_trials = 2 + int(np.log(k))
    chosen = [int(draw(weights, 1, rng)[0])]
    nearest = _squared_distances(y, y[chosen])[:, 0]
    for found in range(1, k):
        potential = weights * nearest
        if not potential.sum() > 0:
            raise _too_few_distinct(found, y, k)
        trials = draw(potential, n_trials, rng)
        remaining = np.minimum(nearest[:, None], _squared_distances(y, y[trials]))
        best = int(np.argmin(weights @ remaining))
        nearest = remaining[:, best]
        chosen.append(int(trials[best]))
        nearest[chosen] = 0.0  # distances by expansion leave a rounding error where they should be zero
    return chosen


# -- nearest to rows -----------------------------------------------------------------------------------------------


def nearest_to_random_rows(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of the nearest of k distinct rows, drawn in proportion to weight. DataError as in ``kmeans``."""
    chosen = random_rows(y, weights, k, rng)
    labels = np.asarray(_squared_distances(y, y[chosen]).argmin(axis=1))
    labels[chosen] = np.arange(k)  # rounding may place two close ones both at one
    return labels


def random_rows(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> list[int]:
    """Numbers of k distinct rows, drawn in proportion to weight. DataError as in ``kmeans``."""
    chosen: list[int] = []
    nearest = np.full(len(y), np.inf)
    for found in range(k):
        masses = np.where(nearest > 0, weights, 0.0)
        if not masses.sum() > 0:
            raise _too_few_distinct(found, y, k)
        chosen.append(int(draw(masses, 1, rng)[0]))
        nearest = np.minimum(nearest, ((y - y[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


# -- vector quantisation -------------------------------------------------------------------------------------------


def quantised(y: Floats, weights: Floats, k: int, rng: np.random.Generator) -> Integers:
    """Labels (m,) of a codebook that grows by splitting its codes (Linde, Buzo & Gray 1980).

    All codes are split at once, at the end those whose cells have the most inertia. No chance is involved. DataError as
    in ``kmeans``.
    """
    require_distinct(y, weights, k)
    centres = np.average(y, axis=0, weights=weights)[None]
    labels = np.zeros(len(y), dtype=np.int64)
    while len(centres) < k:
        centres = _split_codes(y, weights, labels, centres, k)
        labels, _ = _lloyd(y, weights, centres, _pull)
        centres = _centres(y, weights, labels, centres, _pull)
    return labels


def _split_codes(y: Floats, weights: Floats, labels: Integers, centres: Floats, k: int) -> Floats:
    """At most k codes: those of most inertia in two each, along the principal axes of their cells."""
    distances = ((y - centres[labels]) ** 2).sum(axis=1)
    inertia = np.bincount(labels, weights * distances, len(centres))
    widest = np.argsort(-inertia, kind="stable")[: k - len(centres)]
    offsets = np.zeros_like(centres)
    for cell in widest:
        mine = labels == cell
        mean = np.average(y[mine], axis=0, weights=weights[mine])
        centred = y[mine] - mean
        scatter = (centred.T * weights[mine]) @ centred / weights[mine].sum()
        offsets[cell] = CODE_OFFSET * principal_axis(scatter)
    return np.concatenate([centres - offsets, (centres + offsets)[widest]])


def principal_axis(covariance: Floats) -> Floats:
    """(d,) the direction of the largest variance, as long as its deviation; its largest coordinate is positive."""
    variances, directions = np.linalg.eigh(covariance)
    axis = directions[:, -1]
    sign = np.sign(axis[np.argmax(np.abs(axis))])
    return np.asarray(sign * np.sqrt(max(variances[-1], 0.0)) * axis)


# -- what they share -----------------------------------------------------------------------------------------------


def require_distinct(y: Floats, weights: Floats, k: int) -> None:
    """DataError where there are fewer than k distinct rows of positive weight."""
    nearest = np.where(weights > 0, np.inf, 0.0)
    for found in range(k):
        farthest = int(np.argmax(nearest))
        if not nearest[farthest] > 0:
            raise _too_few_distinct(found, y, k)
        nearest = np.minimum(nearest, ((y - y[farthest]) ** 2).sum(axis=1))


def _too_few_distinct(found: int, y: Floats, k: int) -> DataError:
    return DataError(
        f"Only {found} distinct rows were found among the {len(y)} sampled, but n_components={k}. A mixture cannot "
        "have more components than distinct rows: lower n_components."
    )


def draw(masses: Floats, size: int, rng: np.random.Generator) -> Integers:
    """Numbers (size,) drawn in proportion to ``masses``, with replacement."""
    cumulated = np.cumsum(masses)
    return np.minimum(np.searchsorted(cumulated, rng.random(size) * cumulated[-1], side="right"), len(masses) - 1)


#: The weight of rows in the mean of their cell, from their squared distances and the mean of those, (m,) each.
Pull = Callable[[Floats, Floats], Floats]


def _alike(squares: Floats, mean_squares: Floats) -> Floats:
    return np.ones_like(squares)


def _pull(squares: Floats, mean_squares: Floats) -> Floats:
    """Far rows pull less: 1 / (1 + squared distance / mean squared distance of the cell)."""
    return np.asarray(1.0 / (1.0 + squares / np.where(mean_squares > 0, mean_squares, 1.0)))


def _lloyd(y: Floats, weights: Floats, centres: Floats, pull: Pull = _alike) -> tuple[Integers, float]:
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
        centres = _centres(y, weights, labels, centres, pull)
    return labels, inertia


def _centres(y: Floats, weights: Floats, labels: Integers, centres: Floats, pull: Pull) -> Floats:
    """(k, d) means of the clusters, their rows weighted by ``pull`` from where the centres are now."""
    squares = ((y - centres[labels]) ** 2).sum(axis=1)
    mass = np.bincount(labels, weights, len(centres))
    mean_squares = np.bincount(labels, weights * squares, len(centres)) / mass
    pulling, sums = _sums(y, weights * pull(squares, mean_squares[labels]), labels, len(centres))
    return sums / pulling[:, None]


def _squared_distances(y: Floats, centres: Floats) -> Floats:
    """(m, c) squared distances by expansion, never below zero."""
    lengths = np.einsum("id,id->i", y, y)[:, None] + np.einsum("id,id->i", centres, centres)
    return np.maximum(lengths - 2.0 * (y @ centres.T), 0.0)


def _sums(y: Floats, weights: Floats, labels: Integers, k: int) -> tuple[Floats, Floats]:
    """Weight (k,) and weighted sum (k, d) of each cluster."""
    resp = one_hot(labels, k) * weights
    return resp.sum(axis=1), resp @ y


def one_hot(labels: Integers, k: int) -> Floats:
    """(k, m) ones where a row has that label."""
    resp = np.zeros((k, len(labels)))
    resp[labels, np.arange(len(labels))] = 1.0
    return resp
