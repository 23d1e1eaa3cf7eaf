"""The optima that R's mclust finds (6.0.0, converged to 1e-14), from partitions that each test names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture
from streamgmm.covariance import STRUCTURES

FAITHFUL = Path(__file__).parent / "data" / "faithful.csv"


def faithful() -> np.ndarray:
    """Old Faithful (272, 2): minutes that an eruption lasts, minutes until the next."""
    return np.loadtxt(FAITHFUL, delimiter=",", skiprows=1)


def iris() -> np.ndarray:
    return np.asarray(load_iris().data)


#: A hard partition of the rows, by its name.
PARTITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one group": lambda rows: np.zeros(len(rows), dtype=int),
    "eruptions >= 3": lambda rows: np.digitize(rows[:, 0], [3.0]),
    "eruptions cut at 2.5 and 4.2": lambda rows: np.digitize(rows[:, 0], [2.5, 4.2]),
    "species": lambda rows: np.asarray(load_iris().target),
    "setosa or not": lambda rows: np.minimum(load_iris().target, 1),
    "petal length cut at 2.5 and 5.1": lambda rows: np.digitize(rows[:, 2], [2.5, 5.1]),
}


@dataclass(frozen=True)
class Optimum:
    """The total log-likelihood at which EM stops when it starts from the M-step of a partition."""

    rows: Callable[[], np.ndarray]
    kind: str
    partition: str
    log_likelihood: float

    def __str__(self) -> str:
        return f"{self.rows.__name__} {self.kind}, {self.partition}"


OPTIMA = [
    Optimum(faithful, "full", "eruptions >= 3", -1130.26396018),
    Optimum(faithful, "tied", "eruptions >= 3", -1140.18675944),
    Optimum(faithful, "tied", "eruptions cut at 2.5 and 4.2", -1126.31592782),
    Optimum(faithful, "diag", "eruptions >= 3", -1147.80635254),
    Optimum(iris, "full", "one group", -379.91463012),
    Optimum(iris, "full", "setosa or not", -214.35470437),
    Optimum(iris, "full", "species", -180.18547713),
    Optimum(iris, "tied", "setosa or not", -296.44757477),
    Optimum(iris, "tied", "species", -256.35404313),
    Optimum(iris, "diag", "petal length cut at 2.5 and 5.1", -307.17757160),
    Optimum(iris, "spherical", "species", -384.31409506),
]

#: Log-likelihoods after the first E-steps from the M-step of the partition, as printed.
TRACES = [
    (faithful, "full", "eruptions >= 3", [-1130.283183, -1130.264923, -1130.264014, -1130.263963, -1130.263960]),
    (faithful, "tied", "eruptions >= 3", [-1140.234142]),
    (iris, "full", "species", [-182.920849, -182.221738, -181.728309, -181.160911, -180.585893]),
    (iris, "tied", "species", [-256.646184]),
]

#: The spectral radius of EM's Jacobian at the optimum: by how much each step is shorter than the one before.
RATES = [(faithful, "eruptions >= 3", 14, 0.2408), (iris, "species", 30, 0.5655)]


def hard_m_step(rows: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Maximum likelihood of every group by itself, as *_init parameters."""
    groups = [rows[labels == j] for j in range(labels.max() + 1)]
    weights = np.array([len(group) / len(rows) for group in groups])
    matrices = np.stack([np.cov(group.T, bias=True) for group in groups])
    variances = np.diagonal(matrices, axis1=1, axis2=2)
    covariances = {
        "full": matrices,
        "tied": np.einsum("k,kij->ij", weights, matrices),
        "diag": variances,
        "spherical": variances.mean(axis=1),
    }[kind]
    invert = np.linalg.inv if kind in ("full", "tied") else np.reciprocal
    means = np.stack([group.mean(axis=0) for group in groups])
    return {"weights_init": weights, "means_init": means, "precisions_init": invert(covariances)}


def fitted(rows: np.ndarray, kind: str, partition: str, **settings: Any) -> GaussianMixture:
    start = hard_m_step(rows, PARTITIONS[partition](rows), kind)
    k = len(start["weights_init"])
    return GaussianMixture(k, covariance_type=kind, solver="em", reg_covar=0.0, **start, **settings).fit(rows)


def dense(model: GaussianMixture) -> np.ndarray:
    return STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)


@pytest.mark.parametrize("optimum", OPTIMA, ids=str)
def test_optimum(optimum: Optimum) -> None:
    rows = optimum.rows()
    model = fitted(rows, optimum.kind, optimum.partition, tol=1e-13, max_iter=5000)
    assert model.converged_
    assert np.linalg.eigvalsh(dense(model)).min() > 1e-4
    assert len(rows) * model.lower_bound_ == pytest.approx(optimum.log_likelihood, rel=0, abs=1e-5)
    assert len(rows) * model.score(rows) == pytest.approx(optimum.log_likelihood, rel=0, abs=1e-5)


@pytest.mark.parametrize(("source", "kind", "partition", "trace"), TRACES)
def test_trace(source: Callable[[], np.ndarray], kind: str, partition: str, trace: list[float]) -> None:
    """The first E-step is that of the partition's own M-step, so it is the first lower bound."""
    rows = source()
    model = fitted(rows, kind, partition, tol=1e-13, max_iter=5000)
    np.testing.assert_allclose(len(rows) * np.array(model.lower_bounds_[: len(trace)]), trace, rtol=0, atol=1e-5)


def test_faithful_parameters() -> None:
    model = fitted(faithful(), "full", "eruptions >= 3", tol=1e-13, max_iter=5000)
    np.testing.assert_allclose(model.weights_, [0.355873, 0.644127], rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.means_, [[2.03639, 54.47852], [4.28966, 79.96812]], rtol=0, atol=1e-5)


def test_waiting_times_alone() -> None:
    """One feature, two components: the figures of mclust and mixtools, converged."""
    rows = faithful()[:, 1:]
    start = {"weights_init": [0.4, 0.6], "means_init": [[55.0], [80.0]], "precisions_init": [[[0.04]], [[0.04]]]}
    model = GaussianMixture(2, reg_covar=0.0, tol=1e-13, max_iter=5000, **start).fit(rows)
    assert len(rows) * model.lower_bound_ == pytest.approx(-1034.00174983, rel=0, abs=1e-5)
    np.testing.assert_allclose(model.weights_, [0.36088612, 0.63911388], rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.means_[:, 0], [54.61485765, 80.09107036], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(model.covariances_[:, 0, 0]), [5.8712207, 5.8677335], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "partition", "steps", "rate"), RATES)
def test_rate_of_convergence(source: Callable[[], np.ndarray], partition: str, steps: int, rate: float) -> None:
    """Steps of the means shrink by the Jacobian's spectral radius: EM, and not something near it."""
    rows = source()
    means = []
    for n_steps in range(steps - 2, steps + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            means.append(fitted(rows, "full", partition, tol=0.0, max_iter=n_steps).means_)
    observed = np.linalg.norm(means[2] - means[1]) / np.linalg.norm(means[1] - means[0])
    assert observed == pytest.approx(rate, rel=0, abs=1e-3)
