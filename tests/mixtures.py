"""Small mixtures that several tests fit, and how two of them are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture
from streamgmm.covariance import STRUCTURES
from streamgmm.params import MixtureParams

KINDS = tuple(STRUCTURES)
#: The same where each of them takes long: two in the short form.
SLOW_KINDS = [kind if kind in ("full", "diag") else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
UNFINISHED = pytest.warns(ConvergenceWarning, match="did not converge")


def blobs(n: int = 1200, seed: int = 0) -> np.ndarray:
    """Three overlapping components in three features."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=n, p=[0.2, 0.3, 0.5])
    factors = np.eye(3) + 0.4 * np.random.default_rng(1).standard_normal((3, 3, 3))
    centres = np.array([[0.0, 0.0, 0.0], [3.0, 1.0, -1.0], [-2.0, 3.0, 2.0]])
    return centres[labels] + np.einsum("nij,nj->ni", factors[labels], rng.standard_normal((n, 3)))


def mixture_of(rows: np.ndarray, labels: np.ndarray, kind: str) -> MixtureParams:
    """The moments of labelled rows."""
    groups = [rows[labels == j] for j in range(labels.max() + 1)]
    weights = np.array([len(group) / len(rows) for group in groups])
    covariances = np.array([np.cov(group.T) for group in groups])
    means = np.array([group.mean(axis=0) for group in groups])
    return MixtureParams(weights, means, STRUCTURES[kind].from_dense(covariances, weights))


def as_given(start: MixtureParams) -> dict[str, Any]:
    """Parameters of an estimator that give it this start."""
    precisions = start.covariance.precisions(*start.means.shape)
    return {"weights_init": start.weights, "means_init": start.means, "precisions_init": precisions}


def given_start(kind: str) -> dict[str, Any]:
    """A start that is far enough from the optimum for EM to walk some way."""
    matrices = np.stack([np.eye(3), 0.5 * np.eye(3), 2.0 * np.eye(3)])
    precisions = {
        "full": matrices,
        "tied": matrices[0],
        "diag": np.ones((3, 3)),
        "spherical": np.array([1.0, 0.5, 2.0]),
    }
    means = np.array([[-1.0, 0.0, 1.0], [2.0, 2.0, -1.0], [0.0, 3.0, 0.5]])
    return {"weights_init": [0.3, 0.3, 0.4], "means_init": means, "precisions_init": precisions[kind]}


def mixture(kind: str = "full", **settings: Any) -> GaussianMixture:
    return GaussianMixture(3, covariance_type=kind, solver="em", **{"random_state": 0, **settings})


def fitted(kind: str = "full", **settings: Any) -> GaussianMixture:
    return mixture(kind, **settings).fit(blobs())


def dense(model: Any) -> np.ndarray:
    return STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)


def assert_identical(one: GaussianMixture, other: GaussianMixture) -> None:
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
