"""Components of few rows among many: the sample knows next to nothing of them, and no fit may rest on it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS

from streamgmm import GaussianMixture


def rows_with(n_rare: int, mean: float) -> np.ndarray:
    """(100,000, 1) normal rows, the last ones of a narrow cluster."""
    rng = np.random.default_rng(1)
    return np.concatenate([rng.normal(size=(100_000 - n_rare, 1)), mean + 0.5 * rng.normal(size=(n_rare, 1))])


def start_with(n_rare: int, mean: float, precision: float) -> dict[str, Any]:
    share, precisions = n_rare / 100_000, np.array([1.0, precision])[:, None, None]
    return {"weights_init": [1.0 - share, share], "means_init": [[0.0], [mean]], "precisions_init": precisions}


def converged_em(rows: np.ndarray, **start: Any) -> GaussianMixture:
    return GaussianMixture(2, solver="em", tol=1e-11, max_iter=500, **start).fit(rows)


def test_a_fit_ends_where_em_on_all_rows_leaves_a_rare_component() -> None:
    """Six of its rows are in the sample, so walks do not follow it; the gap tells of its steps nevertheless."""
    rows, start = rows_with(30, 5.0), start_with(30, 6.5, 0.3)
    model = GaussianMixture(2, random_state=0, **start).fit(rows)
    tol = 0.1 * 5 / (2 * 100_000)
    assert model.converged_
    assert converged_em(rows, **start).score(rows) - model.score(rows) < 0.5 * tol


@pytest.mark.parametrize("sample_rows", [60, 2_000])
def test_an_optimum_with_a_component_of_few_rows_is_not_left_for_a_spike_of_the_sample(sample_rows: int) -> None:
    """The sample would rather have one of its rows as a component: there the likelihood of all rows is far lower."""
    rows = rows_with(60, 8.0)
    model = converged_em(rows, **start_with(60, 8.0, 4.0))
    score, means = model.score(rows), model.means_
    model.set_params(solver="auto", sample_rows=sample_rows, warm_start=True, tol=None, random_state=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(rows)
    assert model.score(rows) >= score - 1e-9
    np.testing.assert_allclose(model.means_, means, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0.0, 5.0])
def test_a_sample_of_rows_that_are_all_alike(kind: str, first: float) -> None:
    rows = np.zeros((40_000, 2))
    rows[0] = first
    settings = {"covariance_type": kind, "random_state": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The optimum of the sample was|reg_covar=1e-06 is more")
        em = GaussianMixture(1, solver="em", tol=1e-9, **settings).fit(rows)
        model = GaussianMixture(1, sample_rows=1_000, **settings).fit(rows)
    np.testing.assert_allclose(model.means_, em.means_, rtol=1e-9)
    np.testing.assert_allclose(model.covariances_, em.covariances_, rtol=1e-9)
