"""Components of few rows among many: the sample knows next to nothing of them, and no fit may rest on it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS, mixture_of
from samples import REG, moved, part, whole

from streamgmm import GaussianMixture
from streamgmm.errors import NumericalError
from streamgmm.solvers.calibration import Calibrated
from streamgmm.solvers.gain import Point, exact_gain
from streamgmm.solvers.surrogate import Progress
from streamgmm.synthetic import recipe


def rows_with(n_rare: int, n: int, seed: int = 1) -> np.ndarray:
    """(n, 1) normal rows, and some of a narrow cluster far from them."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(n - n_rare, 1)), 6.0 + 0.5 * rng.normal(size=(n_rare, 1))])


def start_with(share: float, mean: float) -> dict[str, Any]:
    precisions = np.array([1.0, 4.0])[:, None, None]
    return {"weights_init": [1.0 - share, share], "means_init": [[0.0], [mean]], "precisions_init": precisions}


def converged_em(rows: np.ndarray, **start: Any) -> GaussianMixture:
    return GaussianMixture(2, solver="em", tol=1e-11, max_iter=500, **start).fit(rows)


def test_a_fit_ends_where_em_on_all_rows_leaves_a_rare_component() -> None:
    """A dozen of its rows are in the sample, so walks do not follow it; the gap tells of its steps nevertheless."""
    rows = rows_with(30, 60_000)
    start = start_with(30 / 60_000, 7.0)
    model = GaussianMixture(2, random_state=0, sample_rows=20_000, **start).fit(rows)
    tol = 0.1 * 5 / (2 * 60_000)
    assert model.converged_
    assert converged_em(rows, **start).score(rows) - model.score(rows) < 0.5 * tol


@pytest.mark.parametrize("sample_rows", [60, 2_000])
def test_an_optimum_with_a_component_of_few_rows_is_not_left_for_a_spike_of_the_sample(sample_rows: int) -> None:
    """The sample would rather have one of its rows as a component: there the likelihood of all rows is far lower."""
    rows = rows_with(60, 100_000)
    model = converged_em(rows, **start_with(60 / 100_000, 6.0))
    score, means = model.score(rows), model.means_
    model.set_params(solver="auto", sample_rows=sample_rows, warm_start=True, tol=None, random_state=1)
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


def test_a_walk_that_breaks_at_once_promises_what_all_rows_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = recipe(3, 2, 8_000, 1.0, 5)
    theta = moved(mixture_of(rows, labels, "full"), np.random.default_rng(0), 0.2)
    point = Point.of(theta, whole(rows).read(theta))
    told = Calibrated.at(point, part(rows[:2_000], 8_000), 3.0, reg_covar=REG)

    def broken(*_: Any) -> Any:
        raise NumericalError("no rows")

    monkeypatch.setattr(Calibrated, "told", broken)
    way = told.walk(20)
    assert way.params is way.em
    assert way.promised == exact_gain(point, way.em, REG) > 1e-3


def test_no_fit_ends_with_a_read_that_is_taken_back() -> None:
    """Nor does what is published fall with it: of two ends of walks from one read the surer is kept."""
    rows, labels = recipe(3, 2, 8_000, 1.0, 5)
    full, sample, rng = whole(rows), part(rows[:2_000], 8_000), np.random.default_rng(0)
    theta = moved(mixture_of(rows, labels, "full"), rng, 0.1)
    once = Progress.at(theta, sample).after(full.read(theta), sample, 0.0, REG)
    worse = moved(theta, rng, 1.0)
    astray = replace(once, next=worse, certain=False)
    again = astray.after(full.read(worse), sample, 1e3, REG)
    assert again.rejected
    assert not again.converged
    assert again.best is once.best
    ends = [exact_gain(again.best, progress.published, REG) for progress in (once, again)]
    assert ends[1] >= ends[0]
