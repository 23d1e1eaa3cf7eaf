"""Inverse Cholesky factors: what turns a row into standard deviations from a component's mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from streamgmm.protocols import Floats


class AbstractRoot(ABC):
    """W_k with W_k Sigma_k W_k^T = I, for each of k components."""

    @property
    @abstractmethod
    def log_det(self) -> Floats:
        """(k,) log |W_k| = -1/2 log |Sigma_k|."""

    @property
    @abstractmethod
    def precision_diagonal(self) -> Floats:
        """(k, d) diagonals of the precision matrices."""

    @abstractmethod
    def whiten(self, component: int, centred: Floats) -> Floats:
        """W_k times feature-major rows (d, b) that have the component's mean subtracted."""

    @abstractmethod
    def precision_apart(self, one: int, other: int, columns: Floats) -> Floats:
        """(P_one - P_other) times columns (d, b): exactly zero where the two precisions are the same."""

    @abstractmethod
    def precision_times(self, offsets: Floats) -> Floats:
        """(k, d) products of each precision with a vector of its own, offsets (k, d)."""


@dataclass(frozen=True, eq=False)
class MatrixRoot(AbstractRoot):
    """Lower triangular factors (k, d, d)."""

    inverse: Floats

    @property
    def log_det(self) -> Floats:
        return np.asarray(np.log(np.diagonal(self.inverse, axis1=1, axis2=2)).sum(axis=1))

    @property
    def precision_diagonal(self) -> Floats:
        return np.asarray((self.inverse**2).sum(axis=1))

    def whiten(self, component: int, centred: Floats) -> Floats:
        return np.asarray(self.inverse[component] @ centred)

    def precision_apart(self, one: int, other: int, columns: Floats) -> Floats:
        first, second = self.inverse[one], self.inverse[other]
        return np.asarray((first.T @ first - second.T @ second) @ columns)

    def precision_times(self, offsets: Floats) -> Floats:
        whitened = np.einsum("kij,kj->ki", self.inverse, offsets)
        return np.einsum("kji,kj->ki", self.inverse, whitened)

    @property
    def precision(self) -> Floats:
        """(k, d, d) precision matrices W^T W."""
        return np.asarray(self.inverse.transpose(0, 2, 1) @ self.inverse)


@dataclass(frozen=True, eq=False)
class AxisRoot(AbstractRoot):
    """Inverse standard deviations (k, d), for covariances along the axes."""

    inverse: Floats

    @property
    def log_det(self) -> Floats:
        return np.asarray(np.log(self.inverse).sum(axis=1))

    @property
    def precision_diagonal(self) -> Floats:
        return self.inverse**2

    def whiten(self, component: int, centred: Floats) -> Floats:
        return self.inverse[component][:, None] * centred

    def precision_apart(self, one: int, other: int, columns: Floats) -> Floats:
        return np.asarray((self.inverse[one] ** 2 - self.inverse[other] ** 2)[:, None] * columns)

    def precision_times(self, offsets: Floats) -> Floats:
        return self.inverse**2 * offsets
