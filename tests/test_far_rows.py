"""Rows at the ends of float64: responsibilities stay finite and right, and one far row costs nothing."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from mixtures import KINDS, blobs, fitted, given_start

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import NumericalError
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import prepare
from streamgmm.pilot import take_pilot

HUGE = (1e8, 1e100, 1e150, 1e154, 1e200, 1e300, 1.7e308)


def rows_at(size: float) -> np.ndarray:
    """Rows in all directions, along the axes and between them, ``size`` from the origin at most."""
    directions = np.random.default_rng(0).uniform(-1, 1, (60, 3))
    return size * np.concatenate([np.eye(3), -np.eye(3), directions])


def exact_responsibilities(model: GaussianMixture, row: np.ndarray) -> list[float]:
    """Those of one row, in exact arithmetic of 700 digits."""
    with mpmath.workdps(700):
        dense = STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)
        joint = []
        for weight, mean, covariance in zip(model.weights_, model.means_, dense, strict=True):
            matrix = mpmath.matrix(covariance.tolist())
            away = mpmath.matrix([mpmath.mpf(float(x)) - mpmath.mpf(float(m)) for x, m in zip(row, mean, strict=True)])
            distance = (away.T * mpmath.inverse(matrix) * away)[0]
            joint.append(mpmath.log(float(weight)) - (mpmath.log(mpmath.det(matrix)) + distance) / 2)
        top = max(joint)
        total = sum(mpmath.exp(value - top) for value in joint)
        return [float(mpmath.exp(value - top) / total) for value in joint]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [*HUGE, 1e-300, 5e-324, 0.0])
def test_responsibilities_are_finite_and_sum_to_one(kind: str, size: float) -> None:
    model = fitted(kind)
    rows = rows_at(size)
    resp, labels = model.predict_proba(rows), model.predict(rows)
    assert np.isfinite(resp).all()
    np.testing.assert_allclose(resp.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(labels, resp.argmax(axis=1))
    density = model.score_samples(rows)
    assert not np.isnan(density).any()
    assert (density < np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e8, 1e150, 1e200, 1e300])
def test_they_are_those_of_exact_arithmetic(kind: str, size: float) -> None:
    model = fitted(kind)
    rows = rows_at(size)[::6]
    found = model.predict_proba(rows)
    expected = [exact_responsibilities(model, row) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_equal_covariances_leave_it_to_the_means(kind: str) -> None:
    """The squares are the same for all components, however large, and only the next term tells them apart."""
    covariances = {"full": np.stack([np.eye(2)] * 3), "diag": np.ones((3, 2)), "spherical": np.ones(3)}[kind]
    means = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    model = GaussianMixture.from_parameters([0.5, 0.3, 0.2], means, covariances, covariance_type=kind)
    far = np.array([[1e300, 0.0], [1e300, 1e300], [-1e300, -1e300]])
    near = 0.3 / (0.3 + 0.2 * np.exp(-0.5))
    expected = [[0.0, near, 1.0 - near], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(model.predict_proba(far), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "diag"])
@pytest.mark.parametrize("size", [1e6, 1e8, 1e12, 1e100, 1e200])
def test_variances_that_some_components_share_leave_it_to_the_others(kind: str, size: float) -> None:
    """Along the first axis all are alike: what a huge first coordinate adds must vanish before it is squared."""
    variances = np.array([[1.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 0.25]])
    covariances = variances if kind == "diag" else np.stack([np.diag(row) for row in variances])
    means = [[0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [0.0, 0.25, 0.25]]
    model = GaussianMixture.from_parameters([0.5, 0.3, 0.2], means, covariances, covariance_type=kind)
    rows = np.random.default_rng(0).normal(size=(20, 3))
    rows[:, 0] = size
    expected = [exact_responsibilities(model, row) for row in rows]
    np.testing.assert_allclose(model.predict_proba(rows), expected, rtol=0, atol=1e-3 if size < 1e7 else 1e-12)


def test_a_component_without_weight_is_never_the_nearest() -> None:
    model = GaussianMixture.from_parameters(
        [0.5, 0.5, 0.0], [[0.0], [1.0], [5.0]], [1.0, 1.0, 9.0], covariance_type="spherical"
    )
    np.testing.assert_allclose(model.predict_proba([[1e300]]), [[0.0, 1.0, 0.0]], rtol=0, atol=1e-12)


def test_far_rows_beside_near_ones_change_nothing() -> None:
    model, rows = fitted(), blobs()
    both = np.concatenate([rows[:500], rows_at(1e250), rows[500:]])
    found = np.delete(model.predict_proba(both), np.arange(500, 566), axis=0)
    np.testing.assert_allclose(found, model.predict_proba(rows), rtol=0, atol=1e-14)


def test_a_sum_of_densities_that_overflow_is_refused_with_the_row() -> None:
    with pytest.raises(NumericalError, match="density of row 1"):
        fitted().score(np.stack([np.zeros(3), np.full(3, 1e200)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e100])
def test_one_far_row_brings_no_component_into_the_slow_form(kind: str, size: float) -> None:
    """Each pass of a fit with one far row takes the form that it takes without."""
    rows = np.concatenate([blobs(5_000), np.full((1, 3), size)])
    model = GaussianMixture(3, covariance_type=kind, max_iter=0, **given_start(kind)).fit(rows[:-1])
    pilot = take_pilot(open_source(rows), SerialExecutor(), np.arange(0, 5_000, 2))
    frame = pilot.frame(isotropic=STRUCTURES[kind].isotropic)
    assert len(prepare(model._params(), frame).centred) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e16])
def test_a_component_that_shrinks_onto_a_far_row_goes_on(kind: str, size: float) -> None:
    """Its variance is lost in the squares of that step: it is no less than nothing, and known again one pass later."""
    glitch = np.array([[size / 3.0, 0.0, 0.0]])
    rows = np.concatenate([blobs(3_000), np.repeat(glitch, 7, axis=0)])
    weights = np.concatenate([np.ones(3_000), np.full(7, 0.1)])  # sums that are no whole numbers, so that they round
    start = given_start(kind)
    start["means_init"] = np.concatenate([start["means_init"][:2], 0.9 * glitch])
    if kind != "tied":
        start["precisions_init"][2] *= 40.0 / size**2  # wide enough for the fast form, which has to square the glitch
    model = GaussianMixture(3, covariance_type=kind, max_iter=500, **start).fit(rows, sample_weight=weights)
    assert model.converged_
    alone = int(np.argmax(model.means_[:, 0]))
    np.testing.assert_allclose(model.means_[alone], glitch[0], rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(model.weights_[alone], 0.7 / weights.sum(), rtol=1e-6)
    if kind != "tied":
        variances = model._params().covariance.variances(3, 3)[alone]
        np.testing.assert_allclose(variances, model.reg_covar, rtol=1e-6)
