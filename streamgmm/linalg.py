"""Cholesky factors that name what failed, and the little linear algebra the mixture needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from streamgmm.errors import NumericalError
from streamgmm.protocols import Floats

WAY_OUT = "Raise reg_covar, lower n_components, drop features that repeat each other, or give the fit more rows."


def inverse_cholesky(matrix: Floats, name: str) -> Floats:
    """W (d, d), lower triangular, with W matrix W^T = I: the inverse of the Cholesky factor of ``matrix``.

    Raises NumericalError, naming ``name`` and the feature at which the factorisation stops, where ``matrix`` is not
    finite or not positive definite.
    """
    require_finite(matrix, name)
    factor, info = lapack.dpotrf(matrix, lower=1, clean=1)
    if info == 0:
        inverse, info = lapack.dtrtri(factor, lower=1)
    if info != 0:
        raise NumericalError(
            f"The {name} is not positive definite: its Cholesky factorisation stops at feature {info - 1} "
            f"(variance {matrix[info - 1, info - 1]:.3g}), which the features before it determine, or whose rows have "
            f"collapsed. {WAY_OUT}"
        )
    return np.asarray(np.tril(inverse))


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
