"""solver="em" as scikit-learn's users know it: what rises, what is kept, what is refused, for every covariance."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS, UNFINISHED, assert_close, assert_identical, blobs, fitted, given_start, mixture
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Reference

from streamgmm import GaussianMixture
from streamgmm.errors import NumericalError, ParameterError, StreamGMMError

# -- the lower bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pass_by_pass_the_lower_bound_rises_until_the_fit_has_converged(kind: str) -> None:
    """Single passes, each from where the one before ended, walk the way of a whole fit."""
    start = given_start(kind)
    whole = mixture(kind, tol=1e-4, max_iter=500, reg_covar=0.0, **start).fit(blobs())
    model = mixture(kind, tol=1e-4, max_iter=1, reg_covar=0.0, warm_start=True, **start)
    scores = []
    for _ in range(whole.n_iter_):
        with UNFINISHED:
            model.fit(blobs())
        scores.append(model.score(blobs()))
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(scores[:-1], whole.lower_bounds_[1:], rtol=1e-12)
    assert_close(model, whole, 1e-10)
    assert whole.converged_
    assert abs(np.diff(whole.lower_bounds_)[-1]) < 1e-4 <= abs(np.diff(whole.lower_bounds_)[:-1]).min()


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_fit_is_a_better_fit(kind: str) -> None:
    bounds = []
    for max_iter in (1, 2, 3, 5, 8):
        with UNFINISHED:
            model = mixture(kind, tol=0.0, reg_covar=0.0, max_iter=max_iter, **given_start(kind)).fit(blobs())
        assert (model.n_iter_, model.converged_, len(model.lower_bounds_)) == (max_iter, False, max_iter)
        bounds.append(model.lower_bound_)
    assert bounds == sorted(set(bounds))


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_tol_never_stops_earlier(kind: str) -> None:
    fits = [mixture(kind, tol=tol, max_iter=2000, **given_start(kind)).fit(blobs()) for tol in (1e-1, 1e-3, 1e-5, 1e-7)]
    passes = [fit.n_iter_ for fit in fits]
    assert passes == sorted(passes)
    assert passes[0] < passes[-1]
    assert all(fit.converged_ for fit in fits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warning_comes_only_where_the_fit_was_cut_short(kind: str) -> None:
    start = given_start(kind)
    n = mixture(kind, **start).fit(blobs()).n_iter_
    assert mixture(kind, max_iter=n, **start).fit(blobs()).converged_
    with pytest.warns(ConvergenceWarning, match=rf"did not converge in {n - 1} passes: .* 0\.001 or less"):
        model = mixture(kind, max_iter=n - 1, **start).fit(blobs())
    assert not model.converged_


# -- starts ------------------------------------------------------------------------------------------------------------


def flat(n: int = 400) -> np.ndarray:
    """Rows without clusters, where every start leads somewhere else."""
    return np.random.default_rng(5).uniform(size=(n, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_starts_are_never_worse_and_their_best_is_published(kind: str, seed: int) -> None:
    settings = {"init_params": "random_from_data", "random_state": seed, "tol": 1e-4, "max_iter": 1000}
    one, five = (mixture(kind, n_init=n, **settings).fit(flat()) for n in (1, 5))
    assert five.lower_bound_ >= one.lower_bound_
    assert five.lower_bound_ == max(five.lower_bounds_)
    assert five.n_iter_ == len(five.lower_bounds_) <= five.n_passes_ - 1
    assert 0 <= five.score(flat()) - five.lower_bound_ < 1e-4, "the parameters are those of the bound, one step on"


def test_more_starts_do_find_better_ones() -> None:
    settings = {"init_params": "random_from_data", "tol": 1e-4, "max_iter": 1000}
    better = 0
    for seed in range(10):
        one, five = (mixture(n_init=n, random_state=seed, **settings).fit(flat()) for n in (1, 5))
        better += five.lower_bound_ > one.lower_bound_ + 1e-3
    assert better >= 5


def test_a_warm_start_seeks_no_starts(caplog: pytest.LogCaptureFixture) -> None:
    model = mixture(warm_start=True, n_init=3).fit(blobs())
    score = model.score(blobs())
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        model.fit(blobs())
    assert "start(s)" not in caplog.text
    assert model.lower_bounds_[0] == pytest.approx(score, rel=1e-13)
    assert model.n_iter_ == 2, "where it had converged, a second pass sees no change"


def test_a_warm_start_takes_other_rows() -> None:
    model = mixture(warm_start=True).fit(blobs())
    begun = GaussianMixture.from_parameters(model.weights_, model.means_, model.covariances_)
    model.fit(blobs(900, seed=7))
    assert model.lower_bounds_[0] == pytest.approx(begun.score(blobs(900, seed=7)), rel=1e-13)


BAD_STARTS: dict[str, dict[str, Any]] = {
    "too few weights": {"weights_init": [0.5, 0.5]},
    "weights in a table": {"weights_init": [[0.2, 0.3, 0.5]]},
    "weights below zero": {"weights_init": [0.6, 0.6, -0.2]},
    "weights above one": {"weights_init": [1.5, 0.0, 0.0]},
    "weights that do not sum to one": {"weights_init": [0.2, 0.3, 0.3]},
    "too few means": {"means_init": np.zeros((2, 3))},
    "means of too many features": {"means_init": np.zeros((3, 4))},
    "flat means": {"means_init": np.zeros(9)},
    "means that are not finite": {"means_init": np.full((3, 3), np.nan)},
}


def bad_precisions(kind: str) -> dict[str, Any]:
    """Precisions of another structure, of another size, and with one that is negative."""
    good = np.asarray(given_start(kind)["precisions_init"])
    negative = good.copy()
    negative.flat[0] = -1.0
    not_finite = good.copy()
    not_finite.flat[0] = np.inf
    arrays = [good[None], good[:2], negative, not_finite]
    if kind in ("full", "tied"):
        skewed = good.copy()
        skewed[..., 0, 1] += 0.5
        arrays.append(skewed)
    return {f"precisions {i}": {"precisions_init": array} for i, array in enumerate(arrays)}


ALL_BAD_STARTS = [
    pytest.param(kind, name, value, id=f"{kind}: {what}")
    for kind in KINDS
    for what, bad in {**BAD_STARTS, **bad_precisions(kind)}.items()
    for name, value in bad.items()
]


@pytest.mark.parametrize(("kind", "name", "value"), ALL_BAD_STARTS)
def test_starts_that_scikit_learn_refuses_are_refused(kind: str, name: str, value: Any) -> None:
    """By the same name, and as a ParameterError, which is a ValueError as there."""
    chosen = {**given_start(kind), name: value}
    with pytest.raises(ValueError, match=rf"{name.removesuffix('s_init')}|Input contains|Found array with dim"):
        Reference(3, covariance_type=kind, **chosen).fit(blobs())
    with pytest.raises(ParameterError, match=f"^{name} must "):
        mixture(kind, **chosen).fit(blobs())


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_iter", [0, 1, 4, 200])
def test_fit_predict_is_fit_then_predict_wherever_the_fit_ends(kind: str, max_iter: int) -> None:
    """Labels come from the published parameters, also where the last M-step was not followed by an E-step."""
    settings = {"max_iter": max_iter, "tol": 1e-5, "n_init": 2, "init_params": "random_from_data"}
    one, other = mixture(kind, **settings), mixture(kind, **settings)
    if 0 < max_iter < 200:
        with UNFINISHED:
            labels = one.fit_predict(blobs())
        with UNFINISHED:
            other.fit(blobs())
    else:
        labels = one.fit_predict(blobs())
        other.fit(blobs())
    np.testing.assert_array_equal(labels, other.predict(blobs()))
    assert_identical(one, other)


def test_fit_predict_takes_weights() -> None:
    weights = np.random.default_rng(1).integers(0, 4, 1200)
    labels = mixture().fit_predict(blobs(), sample_weight=weights)
    np.testing.assert_array_equal(labels, mixture().fit(blobs(), sample_weight=weights).predict(blobs()))


# -- structures --------------------------------------------------------------------------------------------------------


def test_one_component_is_the_moments_of_the_rows() -> None:
    """Its covariances are those of all rows, seen through each structure."""
    rows = blobs()
    covariance = np.cov(rows.T, bias=True)
    expected = {
        "full": covariance[None],
        "tied": covariance,
        "diag": np.diagonal(covariance)[None],
        "spherical": np.diagonal(covariance).mean(keepdims=True),
    }
    for kind in KINDS:
        model = GaussianMixture(1, covariance_type=kind, solver="em", reg_covar=0.0).fit(rows)
        np.testing.assert_allclose(model.means_, rows.mean(axis=0)[None], rtol=1e-12)
        np.testing.assert_allclose(model.covariances_, expected[kind], rtol=1e-12)
        assert (model.weights_.tolist(), model.converged_) == ([1.0], True)


#: of three components in three features, counted by hand: 2 weights, 9 means, and the covariances
N_PARAMETERS = {"full": 2 + 9 + 3 * 6, "tied": 2 + 9 + 6, "diag": 2 + 9 + 3 * 3, "spherical": 2 + 9 + 3}


@pytest.mark.parametrize("kind", KINDS)
def test_criteria_punish_every_free_parameter(kind: str) -> None:
    """BIC - AIC = P (log n - 2)."""
    n_parameters = N_PARAMETERS[kind]
    model, rows = fitted(kind), blobs(700, seed=3)
    assert model.bic(rows) - model.aic(rows) == pytest.approx(n_parameters * (np.log(700) - 2), rel=1e-9)
    assert model.aic(rows) == pytest.approx(-2 * model.score_samples(rows).sum() + 2 * n_parameters, rel=1e-12)


# -- rows that leave no room -------------------------------------------------------------------------------------------


def two_points() -> np.ndarray:
    """Half of the rows at one place, half at another."""
    return np.repeat([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], 50, axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_two_places_need_regularisation(kind: str) -> None:
    """As in scikit-learn: without it the covariances are singular, with it they are reg_covar."""
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        Reference(2, covariance_type=kind, reg_covar=0.0, random_state=0).fit(two_points())
    with pytest.raises(NumericalError, match=r"not positive definite|has variance.*Raise reg_covar"):
        GaussianMixture(2, covariance_type=kind, reg_covar=0.0, random_state=0, solver="em").fit(two_points())
    model = GaussianMixture(2, covariance_type=kind, reg_covar=1e-6, random_state=0, solver="em").fit(two_points())
    np.testing.assert_allclose(model.weights_, 0.5, rtol=1e-9)
    np.testing.assert_allclose(np.sort(model.means_[:, 0]), [0.0, 1.0], atol=1e-9)
    matrix = {"full": np.stack([np.eye(3)] * 2), "tied": np.eye(3), "diag": np.ones((2, 3)), "spherical": np.ones(2)}
    np.testing.assert_allclose(model.covariances_, 1e-6 * matrix[kind], rtol=1e-6, atol=1e-15)


def test_failures_of_a_fit_are_value_errors_as_in_scikit_learn() -> None:
    for kind in (NumericalError, ParameterError):
        assert issubclass(kind, ValueError)
        assert issubclass(kind, StreamGMMError)


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_with_the_component_that_drew_them(kind: str) -> None:
    """In the order of components, as scikit-learn gives them; far components are told apart again."""
    fit = fitted(kind)
    model = GaussianMixture.from_parameters(
        fit.weights_, 50.0 * fit.means_, fit.covariances_, covariance_type=kind
    ).set_params(random_state=2)
    rows, labels = model.sample(300)
    assert (rows.shape, labels.shape, rows.dtype, labels.dtype.kind) == ((300, 3), (300,), np.float64, "i")
    assert (np.diff(labels) >= 0).all()
    np.testing.assert_array_equal(model.predict(rows), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_is_a_table_of_one_row(kind: str) -> None:
    rows, labels = fitted(kind).sample()
    assert (rows.shape, labels.shape) == ((1, 3), (1,))


def test_samples_are_drawn_from_fitted_models_only() -> None:
    with pytest.raises(NotFittedError, match="not fitted yet"):
        mixture().sample(3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_of_samples_is_as_near_to_the_mixture_as_chance_allows(kind: str) -> None:
    """Twice the gain in log-likelihood over the truth has the distribution chi-squared with P degrees (Wilks 1938)."""
    truth, n = mixture(kind, tol=1e-5, max_iter=500).fit(blobs()).set_params(random_state=3), 20_000
    rows, _ = truth.sample(n)
    start = {"weights_init": truth.weights_, "means_init": truth.means_, "precisions_init": truth.precisions_}
    found = mixture(kind, tol=1e-8, max_iter=500, reg_covar=0.0, **start).fit(rows)
    gain = 2 * n * (found.score(rows) - truth.score(rows))
    p = N_PARAMETERS[kind]
    assert p - 5 * np.sqrt(2 * p) < gain < p + 5 * np.sqrt(2 * p)
    assert gain > 0
