"""One covariance matrix that all components share."""

from __future__ import annotations

from typing import Self

import numpy as np

from streamgmm.covariance.base import AbstractCovariance, from_log_cholesky, log_cholesky, lost_below, mean_offsets
from streamgmm.covariance.roots import AbstractRoot, MatrixRoot
from streamgmm.linalg import inverse_cholesky
from streamgmm.protocols import Booleans, Floats
from streamgmm.quadratic import Nothing, pack, unpack
from streamgmm.stats import SufficientStats


class TiedCovariance(AbstractCovariance):
    """values: (d, d). The quadratic term is the same for all components, so scores are affine in a row."""

    kind = "tied"
    quadratic = Nothing()
    shared = True

    @staticmethod
    def shape(k: int, d: int) -> tuple[int, ...]:
        return (d, d)

    @staticmethod
    def n_parameters(k: int, d: int) -> int:
        return d * (d + 1) // 2

    @classmethod
    def from_dense(cls, matrices: Floats, weights: Floats | None = None) -> Self:
        return cls(np.average(matrices, axis=0, weights=weights))

    @classmethod
    def from_precisions(cls, precisions: Floats) -> Self:
        root = inverse_cholesky(precisions, "shared precision matrix")
        return cls(root.T @ root)

    def dense(self, k: int, d: int) -> Floats:
        return np.broadcast_to(self.values, (k, d, d))

    def variances(self, k: int, d: int) -> Floats:
        return np.broadcast_to(np.diagonal(self.values), (k, d))

    def second_moments(self, k: int, d: int) -> tuple[Floats, Floats]:
        return np.empty((k, 0)), pack(self.values)

    def scaled(self, scale: Floats) -> Self:
        return type(self)(self.values * np.outer(scale, scale))

    def root(self, k: int, d: int) -> MatrixRoot:
        return MatrixRoot(np.broadcast_to(inverse_cholesky(self.values, "shared covariance matrix"), (k, d, d)))

    def natural_quadratic(self, root: AbstractRoot) -> Floats:
        return np.empty((len(root.log_det), 0))

    def updated(self, stats: SufficientStats, alive: Booleans, reg_covar: Floats) -> Self:
        mass, offset = mean_offsets(stats, alive)
        between = (mass * alive[:, None] * offset).T @ offset
        squares = unpack(stats.common, len(reg_covar))
        within = squares - 0.5 * (between + between.T)
        floor = lost_below(np.diagonal(squares))
        lost = np.diagonal(within) < floor
        within[lost | lost[:, None]] = 0.0  # what is left of a covariance is rounding too
        within[lost, lost] = floor[lost]
        return type(self)(within / stats.mass.sum() + np.diag(reg_covar))

    def log_cholesky(self, k: int, d: int) -> Floats:
        return log_cholesky(self.values)

    @classmethod
    def from_log_cholesky(cls, vector: Floats, k: int, d: int) -> Self:
        return cls(from_log_cholesky(vector, (d, d)))

    def stretch(self, other: AbstractRoot, k: int, d: int) -> Floats:
        assert isinstance(other, MatrixRoot)
        seen = other.inverse[0] @ self.values @ other.inverse[0].T
        return np.broadcast_to(np.linalg.eigvalsh(seen)[[0, -1]], (k, 2))

    @classmethod
    def chosen(cls, which: Booleans, yes: Self, no: Self) -> Self:
        return yes if which.all() else no

    def precisions(self, k: int, d: int) -> Floats:
        return self.root(1, d).precision[0]

    def precisions_cholesky(self, k: int, d: int) -> Floats:
        return self.root(1, d).inverse[0].T
