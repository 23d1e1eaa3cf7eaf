"""EM in few reads: the laws of the surrogate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamgmm.covariance import STRUCTURES
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import Coordinates
from streamgmm.solvers.surrogate import (
    Point,
    Surrogate,
    restrained_step,
    walk,
)
from streamgmm.stats import Frame
from streamgmm.synthetic import recipe

KINDS = list(STRUCTURES)
REG = 1e-9


def whole(rows: np.ndarray, weights: np.ndarray | None = None) -> Sample:
    """All rows, as a sample that leaves none out."""
    return part(rows, len(rows), weights)


def part(rows: np.ndarray, n_rows: int, weights: np.ndarray | None = None) -> Sample:
    d = rows.shape[1]
    frame = Frame(np.median(rows, axis=0), np.full(d, 0.5))
    weights = np.ones(len(rows)) if weights is None else weights
    return Sample.of(rows, weights, frame, SerialExecutor(), 0, n_rows, complete=len(rows) == n_rows)


def mixture_of(rows: np.ndarray, labels: np.ndarray, kind: str) -> MixtureParams:
    """The moments of labelled rows."""
    groups = [rows[labels == j] for j in range(labels.max() + 1)]
    weights = np.array([len(group) / len(rows) for group in groups])
    covariances = np.array([np.cov(group.T) for group in groups])
    means = np.array([group.mean(axis=0) for group in groups])
    return MixtureParams(weights, means, STRUCTURES[kind].from_dense(covariances, weights))


def moved(params: MixtureParams, rng: np.random.Generator, size: float) -> MixtureParams:
    """A mixture near another one."""
    weights = params.weights * np.exp(size * rng.standard_normal(len(params.weights)))
    values = params.covariance.values * np.exp(size * rng.standard_normal())
    means = params.means + size * rng.standard_normal(params.means.shape)
    return MixtureParams(weights / weights.sum(), means, type(params.covariance)(values))


def mean_log_likelihood(sample: Sample, params: MixtureParams) -> float:
    stats = sample.read(params)
    return stats.log_likelihood / stats.weight


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_what_the_likelihood_gains_where_the_sample_holds_all_rows(kind, offset):
    """L(u) - L(theta) = <S, eta(u) - eta(theta)> + KL, with row weights too; and the first part alone is less."""
    rows, labels = recipe(3, 4, 900, 1.0, 0)
    rng = np.random.default_rng(1)
    rows, weights = rows + offset, rng.integers(1, 4, 900).astype(float)
    sample, theta = whole(rows, weights), mixture_of(rows, labels, kind)
    surrogate = Surrogate.at(Point.of(theta, sample.read(theta)), sample, caution=2.0)
    for size in (1e-3, 0.1, 1.0):
        u = moved(theta, rng, size)
        gain = surrogate.gain(u, sample.groups(u), 1)
        found = mean_log_likelihood(sample, u) - mean_log_likelihood(sample, theta)
        assert gain.estimate == pytest.approx(found, abs=1e-12 * (1 + offset / 10))
        assert gain.exact <= gain.estimate
        assert gain.bound == gain.estimate  # nothing is left out


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_lies_between_what_is_certain_and_the_estimate(kind):
    rows, labels = recipe(3, 3, 4_000, 1.0, 2)
    theta = mixture_of(rows, labels, kind)
    sample = part(rows[:1_000], 4_000)
    surrogate = Surrogate.at(Point.of(theta, whole(rows).read(theta)), sample, caution=2.0)
    u = moved(theta, np.random.default_rng(0), 0.2)
    groups = sample.groups(u)
    careful, bold = (replace(surrogate, caution=z).gain(u, groups, 1) for z in (4.0, 0.5))
    assert careful.exact < careful.bound < bold.bound < bold.estimate == careful.estimate


@pytest.mark.parametrize("kind", KINDS)
def test_the_standard_error_of_the_sample_s_part_is_right(kind):
    """Over many samples, KL estimates spread by what their groups say, and lie around that of all rows."""
    rows, labels = recipe(3, 2, 20_000, 1.0, 3)
    theta = mixture_of(rows, labels, kind)
    rng = np.random.default_rng(5)
    u, point = moved(theta, rng, 0.1), Point.of(theta, whole(rows).read(theta))
    truth = mean_log_likelihood(whole(rows), u) - point.log_likelihood
    z = []
    for _ in range(200):
        sample = part(rows[rng.choice(20_000, 2_000, replace=False)], 20_000)
        gain = Surrogate.at(point, sample, caution=1.0).gain(u, sample.groups(u), 1)
        kl, bound = gain.estimate - gain.exact, gain.bound - gain.exact
        error = -kl * np.log(bound / kl)
        z.append((gain.estimate - truth) / error)
    assert abs(np.mean(z)) < 3.0 / np.sqrt(200)
    assert 0.85 < np.std(z) < 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_em(kind):
    rows, labels = recipe(3, 3, 2_000, 1.0, 4)
    theta = mixture_of(rows, labels, kind)
    full, sample = whole(rows), part(rows[:300], 2_000)
    stats = full.read(theta)
    way = walk(Surrogate.at(Point.of(theta, stats), sample, 2.0), sample, 1, REG)
    wanted, _ = m_step(stats, theta, REG)
    for found in (way.params, way.em, way.safe):
        np.testing.assert_allclose(found.means, wanted.means, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.weights, wanted.weights, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.covariance.values, wanted.covariance.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_raise_the_surrogate(kind):
    rows, labels = recipe(4, 3, 4_000, 0.8, 5)
    sample = part(rows[:800], 4_000)
    theta = mixture_of(rows, labels, kind)
    point = Point.of(theta, whole(rows).read(theta))
    surrogate = Surrogate.at(point, sample, 2.0)
    u, before = point.em_step(0.0), 0.0
    for step in range(1, 40):
        groups = sample.groups(u)
        gain = surrogate.gain(u, groups, step).estimate
        assert gain >= before - 1e-13
        u, before = restrained_step(surrogate.corrected(groups), u, point, 0.0), gain


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_mixtures(kind):
    rows, labels = recipe(3, 4, 600, 1.0, 7)
    params = mixture_of(rows * [1, 1e6, 1e-6, 1], labels, kind)
    coordinates = Coordinates.of(params)
    vector = coordinates.vector(params)
    again = coordinates.mixture(vector)
    assert len(vector) == params.n_parameters + 1  # weights sum to one
    np.testing.assert_allclose(again.weights, params.weights, rtol=1e-13)
    np.testing.assert_allclose(again.means, params.means, rtol=1e-12)
    np.testing.assert_allclose(again.covariance.dense(3, 4), params.covariance.dense(3, 4), rtol=1e-9, atol=1e-15)
    coordinates.mixture(vector + np.random.default_rng(0).standard_normal(len(vector)))  # any vector is one


@pytest.mark.parametrize("kind", KINDS)
def test_stretch_names_the_least_and_the_largest_variance(kind):
    rows, labels = recipe(3, 3, 600, 1.0, 8)
    one, other = mixture_of(rows, labels, kind), mixture_of(rows * [1.0, 2.0, 0.5], labels, kind)
    found = other.covariance.stretch(one.covariance.root(3, 3), 3, 3)
    first, second = one.covariance.dense(3, 3), other.covariance.dense(3, 3)
    wanted = [
        np.sort(np.linalg.eigvals(np.linalg.solve(a, b)).real)[[0, -1]] for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
