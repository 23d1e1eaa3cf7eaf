"""Cholesky factors that name what failed, and the little linear algebra the mixture needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from streamgmm.errors import NumericalError
from streamgmm.protocols import Floats

WAY_OUT = "Raise reg_covar, lower n_components, drop features that repeat each other, or give the fit more rows."

#: Where eps times the variance inflation of a feature is larger, a Cholesky factor is refined.
REFINE_LIMIT = 1e-9

#: A refined pivot that falls below this share of the plain one was rounding noise: the matrix is singular.
LEAST_PIVOT = 1e-3


def inverse_cholesky(matrix: Floats, name: str) -> Floats:
    """W (d, d), lower triangular, with W matrix W^T = I: the inverse of the Cholesky factor of ``matrix``.

    Raises NumericalError, naming ``name`` and the feature at which the factorisation stops, where ``matrix`` is not
    finite or not positive definite.
    """
    return np.asarray(inverse_choleskys(matrix[None], name)[0])


def inverse_choleskys(matrices: Floats, name: str) -> Floats:
    """As ``inverse_cholesky`` of each of k matrices (k, d, d). name: with {} for the number of one."""
    for number in map(int, np.flatnonzero(~np.isfinite(matrices).all(axis=(1, 2)))):
        require_finite(matrices[number], name.format(number))
    variances = np.diagonal(matrices, axis1=1, axis2=2)
    scale = power_of_two(np.sqrt(np.abs(variances)))
    scaled = matrices * scale[:, :, None] * scale[:, None, :]  # one after the other: the product may overflow
    factors, inverses = np.empty_like(scaled), np.empty_like(scaled)
    for number, matrix in enumerate(scaled):
        factors[number], info = lapack.dpotrf(matrix, lower=1, clean=1)
        if info == 0:
            inverses[number], info = lapack.dtrtri(factors[number], lower=1)
        if info != 0:
            raise _not_positive(name.format(number), info, variances[number])
    inflation = np.max((inverses**2).sum(axis=1) * np.diagonal(scaled, axis1=1, axis2=2), axis=1)
    for number in map(int, np.flatnonzero(np.finfo(np.float64).eps * inflation > REFINE_LIMIT)):
        inverses[number], info = _refined(inverses[number], factors[number], scaled[number])
        if info != 0:
            raise _not_positive(name.format(number), info, variances[number])
    return np.asarray(inverses * scale[:, None, :])


def _not_positive(name: str, info: int, variances: Floats) -> NumericalError:
    """info: the feature, from 1, at which a factorisation stops."""
    return NumericalError(
        f"The {name} is not positive definite: its Cholesky factorisation stops at feature {info - 1} (variance "
        f"{variances[info - 1]:.3g}), which the features before it determine, or whose rows have collapsed. {WAY_OUT}"
    )


def _refined(inverse: Floats, factor: Floats, matrix: Floats) -> tuple[Floats, int]:
    """A more accurate W, and 0; or the number of the feature (from 1) at which ``matrix`` is not positive definite.

    With R = A - L L^T in doubled precision, A = L (I + W R W^T) L^T exactly; the matrix in the middle is near I and is
    factored once more. A plain factor has log det errors of eps * cond(A); this one of about their square.
    """
    error = inverse @ _residual(matrix, factor) @ inverse.T
    correction, info = lapack.dpotrf(np.eye(len(matrix)) + 0.5 * (error + error.T), lower=1, clean=1)
    pivots = np.diagonal(correction) ** 2
    if info == 0 and pivots.min() < LEAST_PIVOT:
        info = int(pivots.argmin()) + 1
    if info != 0:
        return inverse, info
    return np.tril(lapack.dtrtri(correction, lower=1)[0] @ inverse), 0


def _residual(matrix: Floats, factor: Floats) -> Floats:
    """matrix - factor factor^T, its products and sums in doubled precision (Dekker 1971; Knuth's two-sum)."""
    high, low = matrix.copy(), np.zeros_like(matrix)
    for column in factor.T:
        product, rest = _two_product(-column[:, None], column[None, :])
        total = high + product
        part = total - high
        low += (high - (total - part)) + (product - part) + rest
        high = total
    return np.asarray(high + low)


def _two_product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """a * b as a rounded product and its rounding error, exactly (Dekker 1971)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Floats) -> tuple[Floats, Floats]:
    """a as a sum of two numbers of 26 bits each."""
    high = 134217729.0 * a - (134217729.0 * a - a)
    return high, a - high


def inverse_deviations(variances: Floats, name: str) -> Floats:
    """1 / sqrt(variances) (d,); NumericalError, naming ``name``, where a variance is not positive."""
    require_finite(variances, name)
    worst = int(np.argmin(variances))
    if variances[worst] <= 0:
        raise NumericalError(
            f"The {name} is not positive definite: feature {worst} has variance {variances[worst]:.3g}. {WAY_OUT}"
        )
    return np.asarray(1.0 / np.sqrt(variances))


def require_finite(values: Floats, name: str) -> None:
    """NumericalError where ``values`` holds NaN or an infinity."""
    if not np.isfinite(values).all():
        raise NumericalError(
            f"The {name} is not finite: the data are too large to be squared in float64, or a parameter overflowed. "
            "Divide the features by a power of ten that brings them below about 1e150."
        )


def power_of_two(deviation: Floats) -> Floats:
    """The power of two that brings each deviation into [0.5, 1); 1 where it is zero. Multiplying by it is exact."""
    _, exponent = np.frexp(deviation)
    # 2^1023 is the largest there is; smaller deviations than 2^-1023 are left as they are
    return np.where(deviation > 0, np.ldexp(1.0, np.clip(-exponent, -1022, 1023)), 1.0)


def frozen(values: npt.ArrayLike) -> Floats:
    """A read-only, contiguous float64 copy."""
    array = np.array(values, dtype=np.float64, order="C")
    array.flags.writeable = False
    return array
