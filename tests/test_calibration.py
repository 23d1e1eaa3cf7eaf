"""The weighted sample: it tells what every read told, its errors are right, and steps on it climb a lower bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mixtures import KINDS, SLOW_KINDS, mixture_of
from samples import REG, mean_log_likelihood, moved, part, whole

from streamgmm.errors import NumericalError
from streamgmm.free_energy import expected_log_joint as expected
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.solvers.anderson import Coordinates
from streamgmm.solvers.calibration import LEAST_WEIGHT, Calibrated, calibration_bytes, most_reads
from streamgmm.solvers.gain import Gain, Point, Walk, exact_gain, gained
from streamgmm.stats import SufficientStats
from streamgmm.synthetic import recipe


def between(one: MixtureParams, other: MixtureParams, part_of_way: float) -> MixtureParams:
    coordinates = Coordinates.of(one)
    start = coordinates.vector(one)
    return coordinates.mixture(start + part_of_way * (coordinates.vector(other) - start))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_tells_what_every_read_told(kind, offset, weighted):
    """Statistics and likelihood at the parameters of each read are those of all rows."""
    rows, labels = recipe(3, 3, 8_000, 1.0, 2)
    rng = np.random.default_rng(1)
    rows, weights = rows + offset, rng.integers(1, 4, 8_000).astype(float)
    if not weighted:
        weights[:] = 1.0
    full, sample = whole(rows, weights), part(rows[:2_000], 8_000, weights[:2_000])
    theta = mixture_of(rows, labels, kind)
    point, *others = (Point.of(u, full.read(u)) for u in (theta, moved(theta, rng, 0.1), moved(theta, rng, 0.3)))
    told = Calibrated.at(point, sample, 0.0, others)
    for read in (point, *others):
        gain, stats = told.told(read.params, 1)
        assert gain.estimate == pytest.approx(gained(point, read, 0.0), abs=1e-9)
        assert gain.error < 1e-9
        stats = stats.about(read.params.means, stats.scale)
        np.testing.assert_allclose(stats.moments, read.stats.moments, rtol=0, atol=1e-9)
        np.testing.assert_allclose(stats.common, read.stats.common, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_the_standard_error_is_right(kind):
    """Over many samples estimates spread by what each of them says, around the truth; far less than the plain mean."""
    rows, labels = recipe(3, 2, 4_000, 1.0, 3)
    full, rng = whole(rows), np.random.default_rng(5)
    theta = mixture_of(rows, labels, kind)
    u = between(theta, moved(theta, rng, 0.2), 0.7)
    point, other = (Point.of(v, full.read(v)) for v in (theta, moved(theta, rng, 0.1)))
    truth = mean_log_likelihood(full, u) - point.log_likelihood
    z, plain = [], []
    for _ in range(200):
        sample = part(rows[rng.choice(4_000, 2_000, replace=False)], 4_000)
        gain, _ = Calibrated.at(point, sample, 1.0, [other]).told(u, 1)
        assert gain.bound == pytest.approx(gain.estimate - gain.error, rel=1e-12)
        z.append((gain.estimate - truth) / gain.error)
        alone = mean_log_likelihood(sample, u) - mean_log_likelihood(sample, theta)
        plain.append((alone - truth) / (gain.estimate - truth))
    assert abs(np.mean(z)) < 0.5
    assert 0.8 < np.std(z) < 1.2
    assert np.median(np.abs(plain)) > 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_em(kind):
    rows, labels = recipe(3, 3, 4_000, 1.0, 4)
    theta = mixture_of(rows, labels, kind)
    stats = whole(rows).read(theta)
    told = Calibrated.at(Point.of(theta, stats), part(rows[:1_000], 4_000), 2.0, reg_covar=REG)
    way = told.walk(1)
    wanted, _ = m_step(stats, theta, REG)
    step, _ = m_step(told.told(theta, 0)[1], theta, REG)  # and that of the weighted sample is the same
    for found in (way.params, way.em, step):
        np.testing.assert_allclose(found.means, wanted.means, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.weights, wanted.weights, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.covariance.values, wanted.covariance.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_step_are_the_slope_of_the_bound(kind):
    """So that EM's steps with them climb it: the bound's slope in any direction is that of the weighted likelihood."""
    rows, labels = recipe(3, 3, 8_000, 1.0, 5)
    rng = np.random.default_rng(3)
    theta = mixture_of(rows, labels, kind)
    told = Calibrated.at(Point.of(theta, whole(rows).read(theta)), part(rows[:2_000], 8_000), 3.0)
    u, towards = moved(theta, rng, 0.1), moved(theta, rng, 0.3)
    step = 1e-4
    ahead, back = (told.told(between(u, towards, side), 1)[0].bound for side in (step, -step))
    stats = told.told(u, 1)[1]
    slope = (expected(stats, between(u, towards, step)) - expected(stats, between(u, towards, -step))) / (2 * step)
    assert (ahead - back) / (2 * step) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_ends_at_the_largest_bound_it_saw_and_near_the_optimum(kind):
    rows, labels = recipe(4, 3, 20_000, 1.0, 6)
    full, theta = whole(rows), mixture_of(rows, labels, kind)
    point = Point.of(theta, full.read(theta))
    way = Calibrated.at(point, part(rows[:4_000], 20_000), 3.0, reg_covar=REG).walk(60)
    em, _ = m_step(point.stats, theta, REG)
    assert 0.0 < way.gain.bound <= way.gain.estimate <= way.promised
    found = mean_log_likelihood(full, way.params) - point.log_likelihood
    assert found > mean_log_likelihood(full, em) - point.log_likelihood
    assert found >= way.gain.bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_of_few_rows_takes_em_s_own_step_and_no_other(kind):
    """What a few rows tell of it leads nowhere; the others are followed all the same."""
    rng = np.random.default_rng(8)
    many, labels = recipe(2, 2, 20_000, 0.8, 12)
    n_rare, away = (20, 20.0) if kind == "tied" else (40, 0.0)  # where all are as wide it would take other rows too
    rows = np.concatenate([many, many.mean(axis=0) + rng.normal(away, 0.3, (n_rare, 2))])
    theta = mixture_of(rows, np.append(labels, np.full(n_rare, 2)), kind)
    point = Point.of(theta, whole(rows).read(theta))
    sample = part(rows[::5], len(rows))
    em, _ = m_step(point.stats, theta, REG)
    told = Calibrated.at(point, sample, 3.0, reg_covar=REG)
    way = told.walk(30)
    assert told.few.tolist() == [False, False, True]
    assert len(told.controls) == 2 * point.stats.moments.shape[1] + len(point.stats.common)
    assert way.gain.step > 3
    np.testing.assert_allclose(way.params.means[2], em.means[2], rtol=0, atol=1e-9)
    if kind != "tied":
        np.testing.assert_allclose(way.params.covariance.values[2], em.covariance.values[2], rtol=0, atol=1e-9)
    assert way.params.weights[2] == pytest.approx(em.weights[2], rel=1e-2)
    assert np.abs(way.params.means[:2] - em.means[:2]).max() > 1e-3
    assert way.gain.bound > told.walk(1).gain.bound


def test_a_walk_that_does_not_rise_is_given_up(monkeypatch):
    told = overlapping()
    ask = Calibrated.told

    def circling(self: Calibrated, params: MixtureParams, step: int) -> tuple[Gain, SufficientStats]:
        gain, stats = ask(self, params, step)
        return (gain if step <= 3 else replace(gain, bound=0.0)), stats

    monkeypatch.setattr(Calibrated, "told", circling)
    monkeypatch.setattr("streamgmm.solvers.calibration.PATIENCE", 7)
    way = told.walk(200)
    assert (way.gain.step, way.n_steps) == (3, 10)


def test_a_walk_that_breaks_at_once_promises_what_all_rows_tell(monkeypatch):
    rows, labels = recipe(3, 2, 8_000, 1.0, 5)
    theta = moved(mixture_of(rows, labels, "full"), np.random.default_rng(0), 0.2)
    point = Point.of(theta, whole(rows).read(theta))
    told = Calibrated.at(point, part(rows[:2_000], 8_000), 3.0, reg_covar=REG)

    def broken(*_):
        raise NumericalError("no rows")

    monkeypatch.setattr(Calibrated, "told", broken)
    way = told.walk(20)
    assert way.params is way.em
    assert way.promised == exact_gain(point, way.em, REG) > 1e-3


def test_a_walk_promises_what_all_rows_tell_whatever_the_sample_says(monkeypatch):
    told = overlapping()
    ask = Calibrated.told

    def gloomy(self: Calibrated, params: MixtureParams, step: int) -> tuple[Gain, SufficientStats]:
        gain, stats = ask(self, params, step)
        return replace(gain, estimate=-1.0), stats

    monkeypatch.setattr(Calibrated, "told", gloomy)
    way = told.walk(5)
    assert way.n_steps == 5
    assert way.promised >= exact_gain(told.point, way.em, REG) > 0.0


def test_steps_that_gain_too_little_are_not_taken():
    told = overlapping()
    whole_way, short = told.walk(400), told.walk(400, least := 1e-6)
    assert short.n_steps < whole_way.n_steps < 400
    assert 0.0 < whole_way.gain.bound - short.gain.bound < least * (whole_way.n_steps - short.n_steps)


def overlapping() -> Calibrated:
    """A sample of components that overlap, so that walks are long."""
    rows, labels = recipe(3, 2, 20_000, 0.6, 13)
    theta = mixture_of(rows, labels, "full")
    point = Point.of(theta, whole(rows).read(theta))
    return Calibrated.at(point, part(rows[::5], 20_000), 3.0, reg_covar=REG)


def test_weights_equal_repetition():
    rows, labels = recipe(3, 2, 3_000, 1.0, 7)
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 4, 3_000)
    theta = mixture_of(rows, labels, "full")
    u, point = moved(theta, rng, 0.2), Point.of(theta, whole(rows, counts.astype(float)).read(theta))
    repeated = np.repeat(rows[:800], counts[:800], axis=0)
    samples = [part(rows[:800], 3_000, counts[:800].astype(float)), part(repeated, counts.sum())]
    (one, stats), (other, again) = (Calibrated.at(point, sample, 0.0).told(u, 1) for sample in samples)
    assert one.estimate == pytest.approx(other.estimate, abs=1e-10)
    np.testing.assert_allclose(stats.moments, again.moments, rtol=0, atol=1e-10)


def test_how_far_the_sample_is_from_all_rows_is_told():
    """About one where it is drawn from them, far more where it is of other rows or lacks a kind of them."""
    rows, labels = recipe(3, 2, 20_000, 1.0, 8)
    others, _ = recipe(3, 2, 2_000, 3.0, 9)
    theta = mixture_of(rows, labels, "full")
    point = Point.of(theta, whole(rows).read(theta))
    rng = np.random.default_rng(0)
    drawn = [part(rows[rng.choice(20_000, 2_000, replace=False)], 20_000) for _ in range(20)]
    assert np.mean([Calibrated.at(point, sample, 1.0).misfit for sample in drawn]) == pytest.approx(1.0, abs=0.25)
    assert Calibrated.at(point, part(others, 20_000), 1.0).misfit > 10.0
    assert Calibrated.at(point, whole(rows), 1.0).misfit == 0.0


def test_no_row_counts_far_below_nothing():
    """What tells most of such a row is given up: it counts once, and what else was read still holds."""
    rows, labels = recipe(3, 2, 20_000, 1.0, 10)
    theta = mixture_of(rows, labels, "full")
    point = Point.of(theta, whole(rows).read(theta))
    rng, given_up = np.random.default_rng(0), 0
    for _ in range(50):
        sample = part(rows[rng.choice(20_000, 100, replace=False)], 20_000)
        told = Calibrated.at(point, sample, 1.0)
        weights = told.weighted * len(sample)
        assert weights.min() >= LEAST_WEIGHT
        left = np.linalg.matrix_rank(told.controls)
        given_up += left < len(told.controls)
        once = np.abs(weights - 1.0) < 1e-9
        assert once.any() == (left < len(told.controls))
    assert given_up > 3


def test_more_controls_than_the_sample_carries_are_not_used():
    assert [most_reads(2_000, 2_000.0, p) for p in (17, 39, 40, 100)] == [2, 1, 0, 0]
    assert most_reads(2_000, 500.0, 17) == 0
    assert most_reads(2**20, 2.0**20, 32) == 0
    assert calibration_bytes(2_000, 17) == 16 * 2_000 * 36


@pytest.mark.parametrize(
    ("exact", "estimate", "bound", "trusted", "end"),
    [
        (0.0, 1.0, 0.1, False, True),  # what all rows tell is certain
        (-1.0, 1.0, 0.6, True, True),
        (-1.0, 1.0, 0.6, False, False),
        (-1.0, 1.0, 0.4, True, False),
        (-1.0, -2.0, -3.0, True, False),
    ],
)
def test_what_no_read_has_seen_is_published_with_confidence_only(exact, estimate, bound, trusted, end):
    one, other = (mixture_of(*recipe(2, 2, 100, 2.0, seed), "full") for seed in (0, 1))
    way = Walk(one, Gain(exact, estimate, bound, 5), estimate, 5, other)
    assert way.published(trusted=trusted) is (one if end else other)
