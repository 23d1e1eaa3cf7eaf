"""Mixtures with known truth, and rows drawn from them chunk by chunk: for the demo, tests, benchmarks and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamgmm.errors import ParameterError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: Deviations along the axes of a component lie between 1 / sqrt(ECCENTRICITY) and its inverse.
ECCENTRICITY = 3.0
#: Weights are drawn from a symmetric Dirichlet distribution: the larger, the more alike.
CONCENTRATION = 5.0


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights (k,), means (k, d) and covariances (k, d, d) of a mixture that rows are drawn from."""

    weights: Floats
    means: Floats
    covariances: Floats

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.covariances.shape != (k, d, d):
            raise ParameterError(
                f"Weights {self.weights.shape}, means {self.means.shape} and covariances {self.covariances.shape} do "
                f"not belong together: expected (k,), (k, d) and (k, d, d)."
            )

    @property
    def deviations(self) -> Floats:
        """(k, d) standard deviations along the features."""
        return np.sqrt(np.diagonal(self.covariances, axis1=1, axis2=2))

    def rows(self, n: int, seed: int, chunk: int = 0) -> tuple[Floats, Integers]:
        """n rows (n, d) and the components (n,) they come from; a function of (n, seed, chunk) alone."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(chunk,))))
        k, d = self.means.shape
        labels = rng.choice(k, n, p=self.weights / self.weights.sum())
        rows = rng.standard_normal((n, d))
        for j, factor in enumerate(np.linalg.cholesky(self.covariances)):
            mine = labels == j
            rows[mine] = self.means[j] + rows[mine] @ factor.T
        return rows, labels

    def chunks(self, n: int, chunk_rows: int, seed: int) -> Iterator[tuple[Floats, Integers]]:
        """n rows in chunks of ``chunk_rows``. Each has its own stream: any one can be made without the rest."""
        for chunk, start in enumerate(range(0, n, chunk_rows)):
            yield self.rows(min(chunk_rows, n - start), seed, chunk)

    def match(self, means: Floats) -> Integers:
        """For each component here, the row of ``means`` (k, d) that belongs to it: nearest pairs first, none twice."""
        distances = np.linalg.norm((self.means[:, None] - means) / self.deviations[:, None], axis=2)
        order = np.empty(len(distances), dtype=np.int64)
        for _ in range(len(order)):
            mine, other = np.unravel_index(np.argmin(distances), distances.shape)
            order[mine] = other
            distances[mine], distances[:, other] = np.inf, np.inf
        return order


def random_mixture(k: int, d: int, separation: float, seed: int) -> Mixture:
    """A mixture of k components with rotated covariances of random shape in d features.

    The smallest distance between two means is ``separation`` average deviations; the average deviation, the root of
    the mean variance over components and axes, is one.
    """
    if k < 1 or d < 1 or separation <= 0:
        raise ParameterError(
            f"A mixture needs at least one component and one feature and a separation above zero, but k={k}, d={d} "
            f"and separation={separation:g}."
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    weights = rng.dirichlet(np.full(k, CONCENTRATION))
    variances = ECCENTRICITY ** rng.uniform(-1.0, 1.0, (k, d))
    variances /= variances.mean()
    axes = np.linalg.qr(rng.standard_normal((k, d, d))).Q
    covariances = np.einsum("kij,kj,klj->kil", axes, variances, axes)
    means = rng.standard_normal((k, d))
    if k > 1:
        means *= separation / _smallest_distance(means)
    return Mixture(weights, means, 0.5 * (covariances + covariances.swapaxes(1, 2)))


def _box(rng: np.random.Generator, n: int, d: int) -> Floats:
    return rng.uniform(-np.sqrt(3.0), np.sqrt(3.0), (n, d))


def _lognormal(rng: np.random.Generator, n: int, d: int) -> Floats:
    """The exponential of half a Gaussian along every axis: skewness 1.75."""
    mean, variance = np.exp(0.125), np.exp(0.25) * np.expm1(0.25)
    return np.asarray((np.exp(0.5 * rng.standard_normal((n, d))) - mean) / np.sqrt(variance))


def _student(rng: np.random.Generator, n: int, d: int) -> Floats:
    """A t distribution in d dimensions with 5 degrees of freedom."""
    gaussian = rng.standard_normal((n, d))
    return np.asarray(gaussian * np.sqrt(3.0 / rng.chisquare(5.0, (n, 1))))


#: What ``recipe`` can draw a cluster from: n rows (n, d) of mean zero and covariance one.
SHAPES: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "gaussian": lambda rng, n, d: rng.standard_normal((n, d)),
    "t": _student,
    "lognormal": _lognormal,
    "box": _box,
}


def recipe(
    k: int,
    d: int,
    n: int,
    separation: float,
    seed: int,
    shape: str = "gaussian",
    *,
    eccentricity: float = ECCENTRICITY,
    concentration: float = CONCENTRATION,
) -> tuple[Floats, Integers]:
    """n standardised rows (n, d) of a mixture of k overlapping components, in random order, and their components (n,).

    The recipe that published figures of this package are made by; every draw is in a fixed order, so seeds name rows.
    separation: the smallest distance of two means over the root of the largest trace of a covariance.  eccentricity:
    how many times the variance along one axis of a component may be that along another.  concentration: of the
    symmetric Dirichlet distribution of the weights.  shape: of the clusters, one of SHAPES; their weights, means,
    covariances and labels are those of the Gaussian ones.
    """
    if shape not in SHAPES:
        raise ParameterError(f"shape={shape!r} is no shape of clusters. Choose one of {', '.join(SHAPES)}.")
    rng = np.random.default_rng(seed)
    covariances = np.empty((k, d, d))
    for j in range(k):
        axes = np.linalg.qr(rng.standard_normal((d, d))).Q
        logs = rng.uniform(0.0, np.log(eccentricity), d)
        covariances[j] = (axes * np.exp(logs - logs.mean())) @ axes.T
    means = rng.standard_normal((k, d))
    if k > 1:
        means *= separation * np.sqrt(max(np.trace(c) for c in covariances)) / _smallest_distance(means)
    labels = rng.choice(k, n, p=rng.dirichlet(np.full(k, concentration)))
    rows = np.empty((n, d))
    for j, factor in enumerate(np.linalg.cholesky(covariances)):
        mine = labels == j
        rows[mine] = means[j] + SHAPES[shape](rng, int(mine.sum()), d) @ factor.T
    return (rows - rows.mean(axis=0)) / rows.std(axis=0), labels


def _smallest_distance(means: Floats) -> float:
    first, second = np.triu_indices(len(means), 1)
    return float(np.linalg.norm(means[first] - means[second], axis=1).min())
