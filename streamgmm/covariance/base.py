"""What a covariance structure is: a value that knows its features, its root and its update from moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from streamgmm.covariance.roots import AbstractRoot
from streamgmm.linalg import frozen
from streamgmm.protocols import Booleans, Floats
from streamgmm.quadratic import AbstractQuadratic
from streamgmm.stats import SufficientStats


@dataclass(frozen=True, eq=False)
class AbstractCovariance(ABC):
    """Covariances of k components in d features, in the shape that scikit-learn gives them."""

    values: Floats

    kind: ClassVar[str]
    quadratic: ClassVar[AbstractQuadratic]
    #: True where the second moments are summed over the components, because they share one covariance
    shared: ClassVar[bool] = False
    #: True where all features must be measured with one scale
    isotropic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", frozen(self.values))

    @staticmethod
    @abstractmethod
    def shape(k: int, d: int) -> tuple[int, ...]:
        """Shape of ``values`` for k components and d features."""

    @staticmethod
    @abstractmethod
    def n_parameters(k: int, d: int) -> int:
        """Free parameters of the covariances alone."""

    @classmethod
    @abstractmethod
    def from_dense(cls, matrices: Floats, weights: Floats | None = None) -> Self:
        """The nearest of this structure to covariances (k, d, d) of components with weights (k,), or equal ones."""

    @classmethod
    @abstractmethod
    def from_precisions(cls, precisions: Floats) -> Self:
        """From precisions of the same shape as ``values``; NumericalError where they are not positive definite."""

    @abstractmethod
    def dense(self, k: int, d: int) -> Floats:
        """Covariance matrices (k, d, d)."""

    @abstractmethod
    def variances(self, k: int, d: int) -> Floats:
        """Their diagonals (k, d)."""

    @abstractmethod
    def second_moments(self, k: int, d: int) -> tuple[Floats, Floats]:
        """What rows of the components leave on average about their own means: E Q(x - mean) (k, q), and the packed
        second moment (d (d + 1) / 2,) of a component where it is common to all, empty otherwise."""

    @abstractmethod
    def scaled(self, scale: Floats) -> Self:
        """The covariances of x * scale; exact for powers of two."""

    @abstractmethod
    def root(self, k: int, d: int) -> AbstractRoot:
        """Inverse Cholesky factors; NumericalError, naming the component, where there are none."""

    @abstractmethod
    def natural_quadratic(self, root: AbstractRoot) -> Floats:
        """(k, q) coefficients of Q(z) in each log density; (k, 0) where the quadratic term is common to all."""

    @abstractmethod
    def updated(self, stats: SufficientStats, alive: Booleans, reg_covar: Floats) -> Self:
        """The M-step of the covariances in the coordinates of ``stats``, reg_covar (d,) added to the variances.

        alive: (k,) booleans; a component without mass keeps what ``self`` (in the same coordinates) has.
        """

    @abstractmethod
    def log_cholesky(self, k: int, d: int) -> Floats:
        """All covariances as a vector without constraints: lower Cholesky factors, the log of their diagonals."""

    @classmethod
    @abstractmethod
    def from_log_cholesky(cls, vector: Floats, k: int, d: int) -> Self:
        """The inverse of ``log_cholesky``: whatever the numbers, covariances are positive definite or overflow."""

    @abstractmethod
    def stretch(self, other: AbstractRoot, k: int, d: int) -> Floats:
        """(k, 2) the least and the largest variance of each component in any direction, over that of ``other``."""

    @classmethod
    @abstractmethod
    def chosen(cls, which: Booleans, yes: Self, no: Self) -> Self:
        """For each of (k,) components the covariance of ``yes`` or of ``no``; a shared one needs all of them."""

    @abstractmethod
    def precisions(self, k: int, d: int) -> Floats:
        """Inverse covariances, in the shape of ``values``."""

    @abstractmethod
    def precisions_cholesky(self, k: int, d: int) -> Floats:
        """Upper triangular factors U with U U^T the precision (scikit-learn's convention); 1 / deviation without."""


def log_cholesky(matrices: Floats) -> Floats:
    """Lower Cholesky factors (..., d, d) as a vector, row by row of each, with the log of their diagonals."""
    factors = np.linalg.cholesky(matrices)
    i = np.arange(factors.shape[-1])
    factors[..., i, i] = np.log(factors[..., i, i])
    return np.asarray(factors[..., *np.tril_indices(len(i))].ravel())


def from_log_cholesky(vector: Floats, shape: tuple[int, ...]) -> Floats:
    """The inverse: matrices of ``shape`` (..., d, d)."""
    d = shape[-1]
    factors = np.zeros(shape)
    factors[..., *np.tril_indices(d)] = vector.reshape(*shape[:-2], -1)
    i = np.arange(d)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is seen by those who factor it
        factors[..., i, i] = np.exp(factors[..., i, i])
        return np.asarray(factors @ np.swapaxes(factors, -1, -2))


def lost_below(squares: Floats) -> Floats:
    """The variance below which the difference of a mean square, ``squares``, and the square of a mean is rounding.

    A component that shrinks onto a far row within one step has no better variance to show. It takes this one, and the
    centred form in the next pass, which sums about its own mean and so knows better.
    """
    return 8.0 * np.finfo(np.float64).eps * squares


def mean_offsets(stats: SufficientStats, alive: Booleans) -> tuple[Floats, Floats]:
    """Mass (k, 1), 1 where a component has none, and the mean of each component about its origin (k, d)."""
    mass = (alive * stats.mass + ~alive)[:, None]
    return mass, stats.first / mass
