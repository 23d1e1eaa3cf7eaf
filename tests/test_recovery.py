"""The classic small mixture is recovered to within its standard errors, at a thousand and at a million rows."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

SIZES = (1_000, 1_000_000)
SEEDS = range(20)
#: at a million rows the script itself, which the tests of examples run, is a fit of seed 0
SHORT = [(1_000, 0), (1_000, 1), (1_000, 2), (1_000_000, 1)]


def load_example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "two_bumps.py"
    spec = importlib.util.spec_from_file_location("two_bumps", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


two_bumps = load_example()


class Recovery(NamedTuple):
    """One fit. off, left: distance from the truth, and from the maximum of the likelihood, in standard errors (5,)."""

    converged: bool
    off: np.ndarray
    left: np.ndarray


def recover(n: int, seed: int) -> Recovery:
    x = two_bumps.draw(n, seed)
    model = two_bumps.fit(x, seed)
    theta = two_bumps.estimates(model)
    gradient, hessian = two_bumps.derivatives(theta, x)
    off = (theta - two_bumps.TRUTH) / two_bumps.standard_errors(hessian)
    return Recovery(model.converged_, off, two_bumps.remaining_error(gradient, hessian))


@pytest.fixture(scope="module")
def recoveries(request) -> dict[tuple[int, int], Recovery]:
    places = product(SIZES, SEEDS) if request.config.getoption("--long") else SHORT
    return {place: recover(*place) for place in places}


def test_the_parameters_are_those_of_the_classic_mixture():
    np.testing.assert_array_equal(two_bumps.TRUTH, [0.3, -2.0, 0.5, 0.5, 1.0])


def test_at_most_one_parameter_of_all_fits_is_more_than_three_standard_errors_off(recoveries):
    off = {
        (n, seed, name): float(z)
        for (n, seed), fit in recoveries.items()
        for name, z in zip(two_bumps.NAMES, fit.off, strict=True)
    }
    assert len(off) == len(recoveries) * 5
    outside = {place: round(z, 2) for place, z in off.items() if not abs(z) <= 3.0}
    assert len(outside) <= 1, outside


def test_em_stops_far_within_a_standard_error_of_the_maximum(recoveries):
    assert all(fit.converged for fit in recoveries.values())
    assert max(fit.left.max() for fit in recoveries.values()) < 0.05


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> float:
    weights = [theta[0], 1.0 - theta[0]]
    return float(logsumexp(np.log(weights) + norm.logpdf(x, theta[1:3], theta[3:5]), axis=1).sum())


@pytest.mark.parametrize(
    "theta", [two_bumps.TRUTH, np.array([0.55, -1.0, 1.5, 1.25, 0.75])], ids=["truth", "elsewhere"]
)
def test_gradient_and_hessian_are_those_of_the_log_likelihood(theta, monkeypatch):
    monkeypatch.setattr(two_bumps, "BATCH", 77)  # several batches, the last one ragged
    x = two_bumps.draw(500, seed=0)
    gradient, hessian = two_bumps.derivatives(theta, x)
    step = 1e-5
    ways = step * np.eye(5)
    slopes = [(log_likelihood(theta + way, x) - log_likelihood(theta - way, x)) / (2 * step) for way in ways]
    bends = [two_bumps.derivatives(theta + way, x)[0] - two_bumps.derivatives(theta - way, x)[0] for way in ways]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())
    np.testing.assert_allclose(hessian, np.array(bends) / (2 * step), rtol=1e-6, atol=1e-6 * np.abs(hessian).max())
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12, atol=1e-12 * np.abs(hessian).max())
