"""Anderson-accelerated EM: its coordinates, its extrapolations, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest
from mixtures import KINDS, mixture_of
from samples import REG, mean_log_likelihood, whole

from streamgmm.solvers.anderson import Coordinates, Secants, anderson
from streamgmm.solvers.em import em
from streamgmm.synthetic import recipe


def test_an_extrapolation_leaves_a_saddle_and_reaches_a_maximum():
    """Where EM's step changes the distance from a fixed point by a factor, one secant finds it, or leaves it."""
    for rate, wanted in ((0.5, 0.0), (1.1, 2.2)):
        secants = Secants().with_next(np.array([1.0]), np.array([rate]))
        secants = secants.with_next(np.array([rate]), np.array([rate**2]))
        assert secants.extrapolated() == pytest.approx([wanted], abs=1e-6)


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
