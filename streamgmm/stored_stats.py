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
    return sound(
        SufficientStats(
            quadratic,
            as_floats(arrays, f"{prefix}_moments", (k, 1 + d + quadratic.size(d))),
            as_floats(arrays, f"{prefix}_common", (OUTER.size(d),)) if shared else np.empty(0),
            as_floats(arrays, f"{prefix}_origin", (k, d)),
            as_floats(arrays, f"{prefix}_scale", (d,)),
            as_number(facts["log_likelihood"]),
            as_number(facts["log_likelihood_squares"]),
            as_amount(facts["weight"]),
            as_count(facts["n_rows"]),
            as_count(facts["n_skipped"]),
        )
    )


def sound(stats: SufficientStats) -> SufficientStats:
    """The same; ValueError where rows cannot have left it behind."""
    if not (np.frexp(stats.scale)[0] == 0.5).all():
        raise ValueError("scales that are no powers of two")
    if (stats.mass < 0).any() or not abs(stats.mass.sum() - stats.weight) <= 1e-6 * stats.weight:
        raise ValueError("masses that do not sum to the weight of the rows")
    if stats.n_rows < 0 or stats.n_skipped < 0:
        raise ValueError("fewer rows than none")
    return stats
