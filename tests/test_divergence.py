"""The surrogate that the sample's KL makes: what it says of the likelihood, and the steps on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mixtures import KINDS, SLOW_KINDS, mixture_of
from samples import REG, mean_log_likelihood, moved, part, whole

from streamgmm.free_energy import expected_log_joint
from streamgmm.kernel import m_step
from streamgmm.solvers.anderson import Coordinates
from streamgmm.solvers.divergence import Surrogate, restrained_step, walk
from streamgmm.solvers.gain import Point
from streamgmm.synthetic import recipe


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
        certain = expected_log_joint(surrogate.point.stats, u) - expected_log_joint(surrogate.point.stats, theta)
        assert gain.exact == pytest.approx(certain, abs=1e-12 * (1 + offset / 10))
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


@pytest.mark.parametrize("kind", SLOW_KINDS)
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


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_what_other_reads_tell_is_known(kind):
    """Where parameters were read the gain is what all rows gain, without error; nearby the error is less, and right."""
    rows, labels = recipe(3, 3, 8_000, 1.0, 2)
    theta = mixture_of(rows, labels, kind)
    full, rng, coordinates = whole(rows), np.random.default_rng(0), Coordinates.of(theta)
    read = moved(theta, rng, 0.2)
    vector = coordinates.vector(theta)
    near = coordinates.mixture(vector + 0.8 * (coordinates.vector(read) - vector))
    point, other = (Point.of(params, full.read(params)) for params in (theta, read))
    gains = [mean_log_likelihood(full, params) - point.log_likelihood for params in (read, near)]
    alone, told = [], []
    for _ in range(30):
        sample = part(rows[rng.choice(8_000, 1_000, replace=False)], 8_000)
        before, after = Surrogate.at(point, sample, 2.0), Surrogate.at(point, sample, 2.0, [other])
        known = after.gain(read, sample.groups(read), 1)
        assert known.estimate == pytest.approx(gains[0], abs=1e-12)
        assert known.error < 1e-9
        groups = sample.groups(near)
        alone.append(before.gain(near, groups, 1).estimate - gains[1])
        found = after.gain(near, groups, 1)
        told.append([found.estimate - gains[1], found.error])
    errors, expected = np.array(told).T
    assert np.std(errors) < 0.3 * np.std(alone)
    assert 0.6 < np.sqrt(np.mean((errors / expected) ** 2)) < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_em(kind):
    rows, labels = recipe(3, 3, 2_000, 1.0, 4)
    theta = mixture_of(rows, labels, kind)
    full, sample = whole(rows), part(rows[:300], 2_000)
    stats = full.read(theta)
    way = walk(Surrogate.at(Point.of(theta, stats), sample, 2.0, reg_covar=REG), sample, 1)
    wanted, _ = m_step(stats, theta, REG)
    for found in (way.params, way.em, way.published(trusted=False)):
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
def test_a_component_whose_statistics_go_astray_keeps_what_it_had(kind):
    """A mass below zero, a mean far away, a variance tenfold: each is held, and the others learn on."""
    rows, labels = recipe(4, 3, 3_000, 2.0, 6)
    theta = mixture_of(rows, labels, kind)
    point = Point.of(theta, whole(rows).read(theta))
    moments = point.stats.moments.copy()
    moments[0, 0] = -0.01
    moments[1, 1:4] += 50.0 * moments[1, 0]
    moments[2, 4:] *= 1e3
    found = restrained_step(replace(point.stats, moments=moments), theta, point, REG)
    assert (found.weights > 0).all()
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-15)
    found.covariance.root(4, 3)
    np.testing.assert_array_equal(found.means[:2], theta.means[:2])
    # a shared covariance that went astray is one of all components
    assert np.array_equal(found.means[3], theta.means[3]) == theta.covariance.shared


@pytest.mark.parametrize(("deviations", "held"), [(2.0, False), (4.0, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_goes_three_deviations_at_most(kind, deviations, held):
    """The statistics of a component moved as a whole, so that nothing else changes."""
    rows, labels = recipe(4, 3, 3_000, 2.0, 6)
    theta = mixture_of(rows, labels, kind)
    point = Point.of(theta, whole(rows).read(theta))
    em_step = point.em_step(REG)
    origin = point.stats.origin.copy()
    origin[1, 0] += deviations / np.sqrt(np.linalg.inv(theta.covariance.dense(4, 3)[1])[0, 0])
    found = restrained_step(replace(point.stats, origin=origin), theta, point, REG)
    wanted = theta.means[1] if held else em_step.means[1] + origin[1] - point.stats.origin[1]
    np.testing.assert_allclose(found.means[1], wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.means[2], em_step.means[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("factor", "held"), [(2.0, False), (4.0, True), (0.5, False), (0.3, True)])
@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_weight_changes_threefold_at_most(kind, factor, held):
    rows, labels = recipe(4, 3, 3_000, 2.0, 6)
    theta = mixture_of(rows, labels, kind)
    point = Point.of(theta, whole(rows).read(theta))
    moments = point.stats.moments.copy()
    moments[1] *= factor
    found = restrained_step(replace(point.stats, moments=moments), theta, point, REG)
    mass = theta.weights[1] if held else moments[1, 0]
    others = np.delete(moments[:, 0], 1).sum()
    assert found.weights[1] == pytest.approx(mass / (mass + others), rel=1e-12)


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
