"""The quadratic part of a row's features, and its polar form.

A covariance structure decides which products of a row are summed: all of them, the squares, or the squared length.
Each is a quadratic map Q with a symmetric bilinear form B, Q(z) = B(z, z), and that is all a change of origin needs:
Q(z + t) = Q(z) + 2 B(z, t) + Q(t).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from streamgmm.loops import expand
from streamgmm.protocols import Floats, Integers


class AbstractQuadratic(ABC):
    """A quadratic map from rows of d features to q products."""

    @abstractmethod
    def size(self, d: int) -> int:
        """q, the number of products of a row of d features."""

    @abstractmethod
    def bilinear(self, a: Floats, b: Floats) -> Floats:
        """B(a, b), shapes (..., d) and (..., d) to (..., q)."""

    @abstractmethod
    def stretch(self, factor: Floats) -> Floats:
        """(q,) factors by which Q(z) grows when z grows by ``factor`` (d,), feature by feature."""

    def mapped(self, sums: Floats, matrices: Floats) -> Floats:
        """(k, q) sums of Q(A z) from those of Q(z), A (k, d, d): diagonal unless all products are summed."""
        return np.asarray(sums * [self.stretch(np.diagonal(matrix)) for matrix in matrices])

    @abstractmethod
    def terms(self, d: int) -> tuple[Integers, Integers, Integers]:
        """(left, right, into): the sum of z[left] z[right] over terms with the same ``into`` is that product."""

    def expand(self, z: Floats, out: Floats) -> None:
        """Write Q of feature-major rows z (d, b) into out (q, b)."""
        expand(z, *self.terms(len(z)), out)

    @abstractmethod
    def weighted_sum(self, z: Floats, weights: Floats) -> Floats:
        """sum_i weights_i Q(z_i) over feature-major rows z (d, b): (q,)."""


@dataclass(frozen=True)
class Outer(AbstractQuadratic):
    """All products z_i z_j with i <= j, row by row of the upper triangle."""

    def size(self, d: int) -> int:
        return d * (d + 1) // 2

    def bilinear(self, a: Floats, b: Floats) -> Floats:
        i, j = _triangle(a.shape[-1])
        return 0.5 * (a[..., i] * b[..., j] + a[..., j] * b[..., i])

    def stretch(self, factor: Floats) -> Floats:
        return self.bilinear(factor, factor)

    def mapped(self, sums: Floats, matrices: Floats) -> Floats:
        return pack(matrices @ unpack(sums, matrices.shape[-1]) @ np.swapaxes(matrices, -1, -2))

    def terms(self, d: int) -> tuple[Integers, Integers, Integers]:
        i, j = _triangle(d)
        return i, j, np.arange(len(i))

    def weighted_sum(self, z: Floats, weights: Floats) -> Floats:
        return pack((z * weights) @ z.T)


@dataclass(frozen=True)
class Squares(AbstractQuadratic):
    """The squares z_i^2."""

    def size(self, d: int) -> int:
        return d

    def bilinear(self, a: Floats, b: Floats) -> Floats:
        return a * b

    def stretch(self, factor: Floats) -> Floats:
        return factor * factor

    def terms(self, d: int) -> tuple[Integers, Integers, Integers]:
        i = np.arange(d)
        return i, i, i

    def weighted_sum(self, z: Floats, weights: Floats) -> Floats:
        return np.asarray((z * z) @ weights)


@dataclass(frozen=True)
class SquaredLength(AbstractQuadratic):
    """The squared length |z|^2. Its scale must be the same for every feature."""

    def size(self, d: int) -> int:
        return 1

    def bilinear(self, a: Floats, b: Floats) -> Floats:
        return np.sum(a * b, axis=-1, keepdims=True)

    def stretch(self, factor: Floats) -> Floats:
        return factor[:1] * factor[:1]

    def terms(self, d: int) -> tuple[Integers, Integers, Integers]:
        i = np.arange(d)
        return i, i, np.zeros_like(i)

    def weighted_sum(self, z: Floats, weights: Floats) -> Floats:
        return np.einsum("ib,ib,b->", z, z, weights).reshape(1)


@dataclass(frozen=True)
class Nothing(AbstractQuadratic):
    """No product at all: components whose quadratic term is common to all of them."""

    def size(self, d: int) -> int:
        return 0

    def bilinear(self, a: Floats, b: Floats) -> Floats:
        return (a * b)[..., :0]

    def stretch(self, factor: Floats) -> Floats:
        return factor[:0]

    def terms(self, d: int) -> tuple[Integers, Integers, Integers]:
        none = np.arange(0)
        return none, none, none

    def weighted_sum(self, z: Floats, weights: Floats) -> Floats:
        return np.empty(0)


@lru_cache(maxsize=8)
def _triangle(d: int) -> tuple[Integers, Integers]:
    """Rows and columns of the upper triangle. Small batches would spend much of their time on finding them."""
    i, j = np.triu_indices(d)
    i.flags.writeable = j.flags.writeable = False
    return i, j


#: The one instance that second moments of full and tied covariances share
OUTER = Outer()


def pack(matrix: Floats) -> Floats:
    """The upper triangle of symmetric matrices (..., d, d), row by row: (..., d (d + 1) / 2)."""
    i, j = _triangle(matrix.shape[-1])
    return matrix[..., i, j]


def unpack(packed: Floats, d: int) -> Floats:
    """Symmetric matrices (..., d, d) from their upper triangles (..., d (d + 1) / 2)."""
    i, j = _triangle(d)
    matrix = np.empty((*packed.shape[:-1], d, d))
    matrix[..., i, j] = packed
    matrix[..., j, i] = packed
    return matrix
