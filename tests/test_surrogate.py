"""EM in few reads: the laws of the surrogate, where it ends, and what it does where the sample misleads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mixtures import KINDS, mixture_of

from streamgmm.executors import SerialExecutor
from streamgmm.free_energy import expected_log_joint
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import Coordinates, Secants, anderson
from streamgmm.solvers.divergence import Surrogate, restrained_step, walk
from streamgmm.solvers.em import em
from streamgmm.solvers.gain import Point
from streamgmm.solvers.surrogate import MOST_STEPS, Progress, surrogate_em
from streamgmm.stats import Frame
from streamgmm.synthetic import recipe

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


def every_read(
    full: Sample, sample: Sample, start: MixtureParams, *, tol: float, max_iter: int
) -> tuple[Progress, list[Progress]]:
    """Where the fit ends, and where it stands after every read."""
    seen = [Progress.at(start, sample)]
    while len(seen) <= max_iter and not seen[-1].converged:
        seen.append(surrogate_em(full.read, sample, seen[-1], tol=tol, max_iter=len(seen), reg_covar=REG))
    return seen[-1], seen[1:]


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


def test_an_extrapolation_leaves_a_saddle_and_reaches_a_maximum():
    """Where EM's step changes the distance from a fixed point by a factor, one secant finds it, or leaves it."""
    for rate, wanted in ((0.5, 0.0), (1.1, 2.2)):
        secants = Secants().with_next(np.array([1.0]), np.array([rate]))
        secants = secants.with_next(np.array([rate]), np.array([rate**2]))
        assert secants.extrapolated() == pytest.approx([wanted], abs=1e-6)


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


# -- where it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_anderson_ends_where_em_ends_sooner_and_never_below_its_best(kind):
    rows, labels = recipe(4, 3, 3_000, 1.0, 9)
    sample, start = whole(rows), mixture_of(rows, labels, kind)
    fast = anderson(sample.read, start, tol=1e-11, max_iter=500, reg_covar=REG)
    slow = em(
        lambda models: tuple(map(sample.read, models)), [start], tol=1e-13, max_iter=5_000, reg_covar=REG,
        report=lambda record: None,
    )  # fmt: skip
    assert fast.converged
    assert fast.n_passes < slow.n_passes
    assert mean_log_likelihood(sample, fast.params) == pytest.approx(slow.lower_bound, abs=1e-9)
    assert mean_log_likelihood(sample, fast.params) >= max(fast.lower_bounds) - 1e-12


@pytest.mark.parametrize(
    "kind",
    [pytest.param("full", marks=pytest.mark.long), "tied", "diag", pytest.param("spherical", marks=pytest.mark.long)],
)
def test_it_ends_at_the_optimum_of_all_rows(kind):
    """From the optimum of a sixth of the rows; as EM does from where it ended, and no read makes it worse."""
    rows, labels = recipe(4, 3, 12_000, 1.0, 10)
    full, sample = whole(rows), part(rows[::6], 12_000)
    start = anderson(sample.read, mixture_of(rows, labels, kind), tol=1e-10, max_iter=800, reg_covar=REG).params
    end, seen = every_read(full, sample, start, tol=1e-9, max_iter=60)
    assert end.converged
    optimum = anderson(full.read, end.published, tol=1e-13, max_iter=2_000, reg_covar=REG)
    assert max(optimum.lower_bounds) - mean_log_likelihood(full, end.published) < 1e-8
    verified = [progress.best.log_likelihood for progress in seen]
    assert verified == sorted(verified)
    for progress in seen:
        assert mean_log_likelihood(full, progress.published) >= progress.best.log_likelihood - 1e-13


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_four_reads_are_nearer_than_em_and_anderson(kind):
    rows, labels = recipe(5, 3, 40_000, 1.0, 11)
    full, sample = whole(rows), part(rows[::5], 40_000)
    start = anderson(sample.read, mixture_of(rows, labels, kind), tol=1e-10, max_iter=800, reg_covar=REG).params
    few = surrogate_em(full.read, sample, Progress.at(start, sample), tol=0.0, max_iter=3, reg_covar=REG)
    others = [
        anderson(full.read, start, tol=0.0, max_iter=3, reg_covar=REG).params,
        em(
            lambda models: tuple(map(full.read, models)), [start], tol=0.0, max_iter=3, reg_covar=REG,
            report=lambda record: None,
        ).params,
    ]  # fmt: skip
    optimum = max(anderson(full.read, few.published, tol=1e-12, max_iter=2_000, reg_covar=REG).lower_bounds)
    gap, *gaps = (optimum - mean_log_likelihood(full, params) for params in (few.published, *others))
    assert gap < 0.5 * min(gaps)
    assert gap < 0.2 * start.n_parameters / (2 * 40_000)


@pytest.mark.long
def test_the_order_of_rows_does_not_matter_to_the_last_digits():
    """Sorted rows and shuffled ones, so that their samples differ, from one start, which is no optimum of either."""
    shuffled, labels = recipe(4, 3, 20_000, 1.0, 19)
    start = mixture_of(shuffled, labels, "full")
    chosen = np.sort(np.random.default_rng(0).choice(20_000, 4_000, replace=False))
    full, found = whole(shuffled), []
    for rows in (shuffled, shuffled[np.argsort(shuffled[:, 0], kind="stable")]):
        sample = part(rows[chosen], 20_000)
        end = surrogate_em(whole(rows).read, sample, Progress.at(start, sample), tol=1e-8, max_iter=50, reg_covar=REG)
        assert end.converged
        found.append(mean_log_likelihood(full, end.published))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# -- where the sample misleads ---------------------------------------------------------------------------------------


def no_worse_than_em(rows: np.ndarray, sample: Sample, start: MixtureParams, reads: int) -> list[Progress]:
    """The passes of a fit that ends no worse than EM from the same start with as many reads, one of them spent more."""
    full = whole(rows)
    end, seen = every_read(full, sample, start, tol=0.0, max_iter=reads + 1)
    plain = em(
        lambda models: tuple(map(full.read, models)), [start], tol=0.0, max_iter=reads, reg_covar=REG,
        report=lambda record: None,
    ).params  # fmt: skip
    assert mean_log_likelihood(full, end.published) >= mean_log_likelihood(full, plain) - 1e-12
    return seen


def test_a_sample_without_a_rare_sharp_component():
    """It is found in the rows all the same, and the first gap says that the sample lacked it."""
    rng = np.random.default_rng(12)
    rows, labels = recipe(2, 2, 20_000, 2.0, 12)
    sharp = 0.01 * rng.standard_normal((200, 2)) + [3.0, -3.0]
    everything = np.concatenate([rows, sharp])
    sample = part(rows[:4_000], len(everything))
    start = mixture_of(
        np.concatenate([rows[:4_000], rows[:40]]), np.concatenate([labels[:4_000], np.full(40, 2)]), "full"
    )
    start = anderson(sample.read, start, tol=1e-10, max_iter=800, reg_covar=REG).params
    seen = no_worse_than_em(everything, sample, start, 8)
    assert seen[-1].first_gap > 0


@pytest.mark.parametrize("reads", [3, 8])
@pytest.mark.parametrize("seed", [13, 14, 15])
def test_a_sample_of_other_rows_is_taken_back(seed, reads):
    """A sample that has nothing to do with the rows: reads are rejected, and the likelihood still rises."""
    rows, labels = recipe(3, 2, 10_000, 1.0, seed)
    others, _ = recipe(3, 2, 2_000, 3.0, 112 - seed)
    seen = no_worse_than_em(rows, part(others, 10_000), mixture_of(rows, labels, "full"), reads)
    assert all(progress.record.inner_steps <= MOST_STEPS for progress in seen)
    verified = [progress.best.log_likelihood for progress in seen]
    assert verified == sorted(verified)


def test_a_plateau():
    """More components than the rows have: the likelihood is flat, and is never lowered."""
    rng = np.random.default_rng(14)
    rows = rng.standard_normal((10_000, 2))
    labels = rng.integers(4, size=10_000)
    sample = part(rows[:2_000], 10_000)
    start = mixture_of(rows + 0.1 * labels[:, None], labels, "full")
    no_worse_than_em(rows, sample, start, 6)
