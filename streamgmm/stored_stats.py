"""Sufficient statistics as arrays and plain values of a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamgmm.files import as_amount, as_count, as_floats, as_number
from streamgmm.params import MixtureParams
from streamgmm.quadratic import OUTER
from streamgmm.stats import SufficientStats


def arrays_of(stats: SufficientStats, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{prefix}_{name}": getattr(stats, name) for name in ("moments", "common", "origin", "scale")}


def facts_of(stats: SufficientStats) -> dict[str, Any]:
    names = ("log_likelihood", "log_likelihood_squares", "weight", "n_rows", "n_skipped")
    return {name: getattr(stats, name) for name in names}


def stats_of(
    facts: Mapping[str, Any], arrays: Mapping[str, Any], prefix: str, params: MixtureParams
) -> SufficientStats:
    """Statistics in the shapes that go with ``params``. KeyError, TypeError or ValueError where they are none."""
    k, d = params.means.shape
    quadratic, shared = params.covariance.quadratic, params.covariance.shared
    scale = as_floats(arrays, f"{prefix}_scale", (d,))
    if not (np.frexp(scale)[0] == 0.5).all():
        raise ValueError("scales that are no powers of two")
    moments = as_floats(arrays, f"{prefix}_moments", (k, 1 + d + quadratic.size(d)))
    weight = as_amount(facts["weight"])
    if (moments[:, 0] < 0).any() or not abs(moments[:, 0].sum() - weight) <= 1e-6 * weight:
        raise ValueError("masses that do not sum to the weight of the rows")
    return SufficientStats(
        quadratic,
        moments,
        as_floats(arrays, f"{prefix}_common", (OUTER.size(d),)) if shared else np.empty(0),
        as_floats(arrays, f"{prefix}_origin", (k, d)),
        scale,
        as_number(facts["log_likelihood"]),
        as_number(facts["log_likelihood_squares"]),
        weight,
        as_count(facts["n_rows"]),
        as_count(facts["n_skipped"]),
    )
