"""Variances along the axes, of its own for every component."""

from __future__ import annotations

from typing import Self

import numpy as np

from streamgmm.covariance.base import AbstractCovariance, lost_below, mean_offsets
from streamgmm.covariance.roots import AbstractRoot, AxisRoot
from streamgmm.linalg import inverse_deviations
from streamgmm.protocols import Booleans, Floats
from streamgmm.quadratic import Squares
from streamgmm.stats import SufficientStats


class DiagCovariance(AbstractCovariance):
    """values: (k, d)."""

    kind = "diag"
    quadratic = Squares()

    @staticmethod
    def shape(k: int, d: int) -> tuple[int, ...]:
        return (k, d)

    @staticmethod
    def n_parameters(k: int, d: int) -> int:
        return k * d

    @classmethod
    def from_dense(cls, matrices: Floats, weights: Floats | None = None) -> Self:
        return cls(np.diagonal(matrices, axis1=1, axis2=2))

    @classmethod
    def from_precisions(cls, precisions: Floats) -> Self:
        inverse = [inverse_deviations(p, f"precision of component {k}") for k, p in enumerate(precisions)]
        return cls(np.stack(inverse) ** 2)

    def dense(self, k: int, d: int) -> Floats:
        return self.values[:, :, None] * np.eye(d)

    def variances(self, k: int, d: int) -> Floats:
        return self.values

    def second_moments(self, k: int, d: int) -> tuple[Floats, Floats]:
        return self.values, np.empty(0)

    def scaled(self, scale: Floats) -> Self:
        return type(self)(self.values * scale**2)

    def root(self, k: int, d: int) -> AxisRoot:
        name = "covariance of component {}"
        return AxisRoot(np.stack([inverse_deviations(v, name.format(j)) for j, v in enumerate(self.values)]))

    def natural_quadratic(self, root: AbstractRoot) -> Floats:
        return -0.5 * root.precision_diagonal

    def updated(self, stats: SufficientStats, alive: Booleans, reg_covar: Floats) -> Self:
        mass, offset = mean_offsets(stats, alive)
        squares = stats.second / mass
        variances = np.maximum(squares - offset**2, lost_below(squares)) + reg_covar
        return type(self)(np.where(alive[:, None], variances, self.values))

    def log_cholesky(self, k: int, d: int) -> Floats:
        return 0.5 * np.log(self.values).ravel()

    @classmethod
    def from_log_cholesky(cls, vector: Floats, k: int, d: int) -> Self:
        with np.errstate(over="ignore"):
            return cls(np.exp(2.0 * vector).reshape(k, d))

    def stretch(self, other: AbstractRoot, k: int, d: int) -> Floats:
        seen = self.values * other.precision_diagonal
        return np.stack([seen.min(axis=1), seen.max(axis=1)], axis=1)

    @classmethod
    def chosen(cls, which: Booleans, yes: Self, no: Self) -> Self:
        return cls(np.where(which[:, None], yes.values, no.values))

    def precisions(self, k: int, d: int) -> Floats:
        return 1.0 / self.values

    def precisions_cholesky(self, k: int, d: int) -> Floats:
        return self.root(k, d).inverse
