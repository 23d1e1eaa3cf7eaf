"""Where EM on all rows ends when it is continued from a model: what the gaps of other benchmarks are measured from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streamgmm import GaussianMixture, Statistics
from streamgmm.errors import NumericalError, ParameterError

#: Steps that an extrapolation looks back on.
DEPTH = 8


def optimum(model: GaussianMixture, rows: np.ndarray, tol: float = 1e-10, most: int = 2000) -> float:
    """The log-likelihood a row, nats, at which EM continued from the model stands still.

    Anderson-accelerated (Walker & Ni 2011) in the space of statistics, where EM maps x to S(M(x)). A step that loses
    likelihood is taken back, so it ends at a fixed point of EM above the model; it ends when three steps in a row gain
    less than ``tol``.
    """
    best, small = -np.inf, 0
    entered: list[np.ndarray] = []
    left: list[np.ndarray] = []
    safe: Statistics | None = None
    for _ in range(most):
        found = model.statistics(rows)
        gain = found.log_likelihood - best
        if gain < -1e-13 and safe is not None:
            model, safe = _model_of(safe, left[-1]), None
            entered, left = [left[-1]], []
            continue
        small = small + 1 if gain < tol else 0
        best = max(best, found.log_likelihood)
        if small == 3:
            return best
        safe = found
        plain = _moments(found)
        left.append(plain)
        model, taken = _next(found, plain, entered, left)
        entered.append(taken)
        entered, left = entered[-DEPTH - 1 :], left[-DEPTH:]
    raise RuntimeError(f"EM did not stand still in {most} passes")


def _moments(statistics: Statistics) -> np.ndarray:
    d = statistics.params.n_features
    return statistics.stats.per_weight().about(np.zeros(d), np.ones(d)).moments


def _next(found: Statistics, plain: np.ndarray, entered: list, left: list) -> tuple[GaussianMixture, np.ndarray]:
    """The model of extrapolated statistics, and those; the plain step where that is no mixture."""
    if len(entered) > 2:
        images = np.array([moments.ravel() for moments in left[-len(entered) :]])
        residuals = images - np.array([moments.ravel() for moments in entered])
        size = 1.0 / (np.abs(images[-1]) + 1e-3)
        shares, *_ = np.linalg.lstsq((np.diff(residuals, axis=0) * size).T, residuals[-1] * size, rcond=1e-9)
        mixed = (images[-1] - shares @ np.diff(images, axis=0)).reshape(plain.shape)
        try:
            return _model_of(found, mixed), mixed
        except (NumericalError, ParameterError):
            pass
    return _model_of(found, plain), plain


def _model_of(found: Statistics, moments: np.ndarray) -> GaussianMixture:
    d = found.params.n_features
    if moments[:, 0].min() <= 0:
        raise NumericalError("a component has lost its rows")
    stats = found.stats.per_weight().about(np.zeros(d), np.ones(d))
    scaled = replace(stats, moments=moments) * found.weight
    return GaussianMixture.from_statistics(Statistics(scaled, found.params))
