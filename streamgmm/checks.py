"""Hyper-parameters and given parameters, checked once at the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from streamgmm.covariance import STRUCTURES, AbstractCovariance
from streamgmm.errors import NumericalError, ParameterError, shown
from streamgmm.linalg import WAY_OUT
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats


@dataclass(frozen=True)
class Rule:
    """One hyper-parameter: what it must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


#: Beyond these float64 cannot square what it must. Wider than what a fit refuses: what it learned can be loaded.
LARGEST_MEAN = 1e153
SMALLEST_VARIANCE = 1e-300

#: Weights that were divided by their sum add up to one within this.
SUM_ROUNDING = 1e-12

#: Counts beyond this have no meaning anywhere.
LARGEST_COUNT = 2**53


def _whole(least: int) -> Rule:
    return Rule(
        f"a whole number of at least {least}",
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and least <= int(v) <= LARGEST_COUNT,
    )


def _is_amount(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < np.inf
    except OverflowError:
        return False


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(map(repr, names))}", lambda v: isinstance(v, str) and v in names)


def _forgotten(value: Any) -> float | None:
    """The share of the past that each row forgets; None where ``value`` says no such thing."""
    if value is None:
        return 0.0
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, rows),) = value.items()
        if name not in ("half_life", "effective_rows") or not _is_amount(rows) or float(rows) < 1.0:
            return None
        # (1 - rate)^half_life = 1/2; for weights rate (1 - rate)^i, 1 / sum of squares = (2 - rate) / rate
        return float(-np.expm1(-np.log(2.0) / float(rows)) if name == "half_life" else 2.0 / (float(rows) + 1.0))
    return float(value) if _is_amount(value) and 0.0 < float(value) <= 1.0 else None


def forgetting_rate(value: Any) -> float:
    """The share of the past that each row forgets, from the hyper-parameter ``forgetting``, which is checked."""
    return _forgotten(value) or 0.0


RULES: dict[str, Rule] = {
    "n_components": _whole(1),
    "covariance_type": _one_of(*STRUCTURES),
    "tol": Rule("None or a number of at least zero", lambda v: v is None or _is_amount(v)),
    "reg_covar": Rule("a number of at least zero", _is_amount),
    "max_iter": _whole(0),
    "n_init": _whole(1),
    "init_params": _one_of("auto", "split", "k-means++", "kmeans", "vq", "random_from_data", "samples", "random"),
    "solver": _one_of("auto", "em", "incremental"),
    "step_exponent": Rule("a number above 0.5 and at most 1", lambda v: _is_amount(v) and 0.5 < float(v) <= 1.0),
    "forgetting": Rule(
        "None, the share that a row forgets (above 0 and at most 1), {'half_life': ROWS} or {'effective_rows': ROWS} "
        "with at least one row",
        lambda v: _forgotten(v) is not None,
    ),
    "prior_rows": Rule("None or a number of at least one", lambda v: v is None or (_is_amount(v) and float(v) >= 1)),
    "sample_rows": Rule("None or a whole number of at least 2", lambda v: v is None or _whole(2).holds(v)),
    "compute_dtype": _one_of("float64", "float32"),
    "average": Rule("True or False", lambda v: isinstance(v, (bool, np.bool_))),
    "warm_start": Rule("True or False", lambda v: isinstance(v, (bool, np.bool_))),
    "verbose": Rule(
        "a whole number of at least 0", lambda v: isinstance(v, (Integral, np.bool_)) and 0 <= int(v) <= LARGEST_COUNT
    ),
    "verbose_interval": _whole(1),
}


def check_hyper_parameters(values: Mapping[str, Any]) -> None:
    """ParameterError at the first hyper-parameter that breaks its rule."""
    for name, rule in RULES.items():
        if not rule.holds(values[name]):
            raise ParameterError(f"{name} must be {rule.words}, but it is {shown(values[name])}.")
    if values["average"] and values["forgetting"] is not None:
        raise ParameterError(
            "average=True is for rows that stay alike, forgetting for rows that change: together they would remember "
            "what is to be forgotten. Set one of them only."
        )


def checked_weights(weights: Any, k: int, name: str) -> Floats:
    """(k,) weights in [0, 1] that sum to one; ParameterError otherwise.

    A sum that is not one beyond rounding is made one; else no bit is changed, for what was saved is loaded as it was.
    """
    array = _of_shape(weights, (k,), name)
    if (array < 0).any() or abs(array.sum() - 1.0) > 1e-6:
        raise ParameterError(
            f"{name} must be at least zero and sum to 1, but the smallest is {array.min():.6g} and they sum to "
            f"{array.sum():.6g}. Divide them by their sum."
        )
    return array / array.sum() if abs(array.sum() - 1.0) > SUM_ROUNDING else array


def checked_means(means: Any, k: int, d: int, name: str) -> Floats:
    """(k, d) finite means; ParameterError otherwise."""
    return _of_shape(means, (k, d), name)


def checked_precisions(precisions: Any, structure: type[AbstractCovariance], k: int, d: int) -> AbstractCovariance:
    """The covariances that belong to precisions_init; ParameterError where they are not positive definite."""
    array = _of_shape(precisions, structure.shape(k, d), "precisions_init")
    array = _symmetric(array, structure, "precisions_init")
    try:
        return structure.from_precisions(array)
    except NumericalError as error:
        raise ParameterError(f"precisions_init must be positive definite. {_without_advice(error)}") from error


def checked_mixture(weights: Any, means: Any, covariances: Any, covariance_type: str) -> MixtureParams:
    """A mixture from arrays; ParameterError where a shape is wrong or a covariance not positive definite."""
    if not RULES["covariance_type"].holds(covariance_type):
        words = RULES["covariance_type"].words
        raise ParameterError(f"covariance_type must be {words}, but it is {shown(covariance_type)}.")
    structure = STRUCTURES[covariance_type]
    means = _numbers(means, "means")
    if means.ndim != 2 or 0 in means.shape:
        raise ParameterError(f"means must have the shape (n_components, n_features), but it is {means.shape}.")
    k, d = means.shape
    array = _of_shape(covariances, structure.shape(k, d), f"covariances of a {covariance_type!r} mixture")
    covariance = structure(_symmetric(array, structure, "covariances"))
    try:
        covariance.root(k, d)
    except NumericalError as error:
        raise ParameterError(_without_advice(error)) from error
    weights, means = checked_weights(weights, k, "weights"), checked_means(means, k, d, "means")
    variances = covariance.variances(k, d)
    if np.abs(means).max() > LARGEST_MEAN or variances.max() > LARGEST_MEAN**2 or variances.min() < SMALLEST_VARIANCE:
        raise ParameterError(
            f"means must lie within {LARGEST_MEAN:g} and variances between {SMALLEST_VARIANCE:g} and "
            f"{LARGEST_MEAN**2:g}, or float64 cannot square them. Rescale the features."
        )
    return MixtureParams(weights, means, covariance)


def _of_shape(values: Any, shape: tuple[int, ...], name: str) -> Floats:
    array = _numbers(values, name)
    if array.shape != shape:
        raise ParameterError(f"{name} must have the shape {shape}, but it has {array.shape}.")
    return finite_numbers(array, name)


def finite_numbers(values: Any, name: str) -> Floats:
    """Values as float64 of any shape; ParameterError where they are no finite real numbers."""
    array = _numbers(values, name)
    if not np.isfinite(array).all():
        raise ParameterError(f"{name} must be finite, but it holds NaN or an infinity.")
    return array


def _numbers(values: Any, name: str) -> Floats:
    try:
        if np.asarray(values).dtype.kind == "c":
            raise TypeError("they are complex")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ParameterError(f"{name} must be real numbers: {error}.") from error


def _symmetric(array: Floats, structure: type[AbstractCovariance], name: str) -> Floats:
    """Matrices without the asymmetry of rounding; ParameterError where there is more of it."""
    if len(structure.shape(2, 3)) < 2 or structure.shape(2, 3)[-2:] != (3, 3):
        return array
    transposed = np.swapaxes(array, -1, -2)
    size = np.sqrt(np.abs(np.diagonal(array, axis1=-2, axis2=-1)))
    if (np.abs(array - transposed) > 1e-6 * size[..., :, None] * size[..., None, :]).any():
        raise ParameterError(f"{name} must be symmetric matrices. Average each with its transpose if that is meant.")
    return 0.5 * (array + transposed)


def _without_advice(error: NumericalError) -> str:
    """What failed, without the advice that is for fits."""
    return str(error).removesuffix(WAY_OUT).strip()
