"""A covariance matrix of its own for every component."""

from __future__ import annotations

from typing import Self

import numpy as np

from streamgmm.covariance.base import AbstractCovariance, from_log_cholesky, log_cholesky, lost_below, mean_offsets
from streamgmm.covariance.roots import AbstractRoot, MatrixRoot
from streamgmm.linalg import inverse_choleskys
from streamgmm.protocols import Booleans, Floats
from streamgmm.quadratic import OUTER, pack, unpack
from streamgmm.stats import SufficientStats


class FullCovariance(AbstractCovariance):
    """values: (k, d, d)."""

    kind = "full"
    quadratic = OUTER

    @staticmethod
    def shape(k: int, d: int) -> tuple[int, ...]:
        return (k, d, d)

    @staticmethod
    def n_parameters(k: int, d: int) -> int:
        return k * d * (d + 1) // 2

    @classmethod
    def from_dense(cls, matrices: Floats, weights: Floats | None = None) -> Self:
        return cls(matrices)

    @classmethod
    def from_precisions(cls, precisions: Floats) -> Self:
        roots = inverse_choleskys(precisions, "precision matrix of component {}")
        return cls(np.stack([root.T @ root for root in roots]))

    def dense(self, k: int, d: int) -> Floats:
        return self.values

    def variances(self, k: int, d: int) -> Floats:
        return np.diagonal(self.values, axis1=1, axis2=2)

    def second_moments(self, k: int, d: int) -> tuple[Floats, Floats]:
        return pack(self.values), np.empty(0)

    def scaled(self, scale: Floats) -> Self:
        return type(self)(self.values * np.outer(scale, scale))

    def root(self, k: int, d: int) -> MatrixRoot:
        return MatrixRoot(inverse_choleskys(self.values, "covariance matrix of component {}"))

    def natural_quadratic(self, root: AbstractRoot) -> Floats:
        assert isinstance(root, MatrixRoot)
        d = root.inverse.shape[-1]
        # -1/2 z^T P z over the upper triangle: every product off the diagonal stands for two
        return -0.5 * pack(root.precision * (2.0 - np.eye(d)))

    def updated(self, stats: SufficientStats, alive: Booleans, reg_covar: Floats) -> Self:
        mass, offset = mean_offsets(stats, alive)
        squares = unpack(stats.second / mass, len(reg_covar))
        covariance = squares - offset[:, :, None] * offset[:, None, :]
        floor = lost_below(np.diagonal(squares, axis1=1, axis2=2))
        lost = np.diagonal(covariance, axis1=1, axis2=2) < floor
        covariance[lost[:, :, None] | lost[:, None, :]] = 0.0  # what is left of a covariance is rounding too
        j, i = np.nonzero(lost)
        covariance[j, i, i] = floor[j, i]
        covariance += np.diag(reg_covar)
        return type(self)(np.where(alive[:, None, None], covariance, self.values))

    def log_cholesky(self, k: int, d: int) -> Floats:
        return log_cholesky(self.values)

    @classmethod
    def from_log_cholesky(cls, vector: Floats, k: int, d: int) -> Self:
        return cls(from_log_cholesky(vector, (k, d, d)))

    def stretch(self, other: AbstractRoot, k: int, d: int) -> Floats:
        assert isinstance(other, MatrixRoot)
        seen = other.inverse @ self.values @ other.inverse.transpose(0, 2, 1)
        return np.asarray(np.linalg.eigvalsh(seen)[:, [0, -1]])

    @classmethod
    def chosen(cls, which: Booleans, yes: Self, no: Self) -> Self:
        return cls(np.where(which[:, None, None], yes.values, no.values))

    def precisions(self, k: int, d: int) -> Floats:
        return self.root(k, d).precision

    def precisions_cholesky(self, k: int, d: int) -> Floats:
        return self.root(k, d).inverse.transpose(0, 2, 1)
