"""One variance for every component, the same in all directions of the data's own metric."""

from __future__ import annotations

from typing import Self

import numpy as np

from streamgmm.covariance.base import AbstractCovariance, lost_below, mean_offsets
from streamgmm.covariance.roots import AbstractRoot, AxisRoot
from streamgmm.linalg import inverse_deviations
from streamgmm.protocols import Booleans, Floats
from streamgmm.quadratic import SquaredLength
from streamgmm.stats import SufficientStats


class SphericalCovariance(AbstractCovariance):
    """values: (k,). Every feature must have the same scale, or the sphere is none."""

    kind = "spherical"
    quadratic = SquaredLength()
    isotropic = True

    @staticmethod
    def shape(k: int, d: int) -> tuple[int, ...]:
        return (k,)

    @staticmethod
    def n_parameters(k: int, d: int) -> int:
        return k

    @classmethod
    def from_dense(cls, matrices: Floats, weights: Floats | None = None) -> Self:
        return cls(np.diagonal(matrices, axis1=1, axis2=2).mean(axis=1))

    @classmethod
    def from_precisions(cls, precisions: Floats) -> Self:
        inverse = [inverse_deviations(p, f"precision of component {k}") for k, p in enumerate(precisions[:, None])]
        return cls(np.concatenate(inverse) ** 2)

    def dense(self, k: int, d: int) -> Floats:
        return self.values[:, None, None] * np.eye(d)

    def variances(self, k: int, d: int) -> Floats:
        return np.broadcast_to(self.values[:, None], (k, d))

    def second_moments(self, k: int, d: int) -> tuple[Floats, Floats]:
        return d * self.values[:, None], np.empty(0)

    def scaled(self, scale: Floats) -> Self:
        return type(self)(self.values * scale[0] ** 2)

    def root(self, k: int, d: int) -> AxisRoot:
        name = "variance of component {}"
        inverse = [inverse_deviations(v, name.format(j)) for j, v in enumerate(self.values[:, None])]
        return AxisRoot(np.broadcast_to(np.stack(inverse), (k, d)))

    def natural_quadratic(self, root: AbstractRoot) -> Floats:
        return -0.5 * root.precision_diagonal[:, :1]

    def updated(self, stats: SufficientStats, alive: Booleans, reg_covar: Floats) -> Self:
        mass, offset = mean_offsets(stats, alive)
        squares = stats.second[:, 0] / mass[:, 0]
        squared_length = np.maximum(squares - (offset**2).sum(axis=1), lost_below(squares))
        variances = squared_length / len(reg_covar) + reg_covar[0]
        return type(self)(np.where(alive, variances, self.values))

    def log_cholesky(self, k: int, d: int) -> Floats:
        return 0.5 * np.log(self.values)

    @classmethod
    def from_log_cholesky(cls, vector: Floats, k: int, d: int) -> Self:
        with np.errstate(over="ignore"):
            return cls(np.exp(2.0 * vector))

    def stretch(self, other: AbstractRoot, k: int, d: int) -> Floats:
        seen = self.values * other.precision_diagonal[:, 0]
        return np.stack([seen, seen], axis=1)

    @classmethod
    def chosen(cls, which: Booleans, yes: Self, no: Self) -> Self:
        return cls(np.where(which, yes.values, no.values))

    def precisions(self, k: int, d: int) -> Floats:
        return 1.0 / self.values

    def precisions_cholesky(self, k: int, d: int) -> Floats:
        return self.root(k, 1).inverse[:, 0]
