"""What a fit leaves behind, as one value, and how it lies in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from streamgmm.checks import check_hyper_parameters, checked_mixture, finite_numbers
from streamgmm.errors import FileFormatError
from streamgmm.files import Contents
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.streams import draw_seed

#: Hyper-parameters that are arrays.
INIT_ARRAYS = ("weights_init", "means_init", "precisions_init")


@dataclass(frozen=True, eq=False)
class Learned:
    """A mixture and how it was found.

    lower_bounds: mean log-likelihood a row, in nats, of the parameters that entered each pass of the published start.
    n_iter: passes that it took.  n_passes: reads of the whole data.  n_rows, n_skipped: rows learned from, and rows
    left out.  provenance: plain values that say where the bits come from.
    """

    params: MixtureParams
    converged: bool = False
    n_iter: int = 0
    n_passes: int = 0
    lower_bounds: tuple[float, ...] = ()
    n_rows: int = 0
    n_skipped: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lower_bound(self) -> float:
        """That of the last pass; minus infinity where there was none."""
        return self.lower_bounds[-1] if self.lower_bounds else -np.inf


@dataclass(frozen=True, eq=False)
class Model:
    """What a model file holds. settings: the hyper-parameters.  feature_names: empty where the rows had none."""

    learned: Learned
    settings: Mapping[str, Any]
    feature_names: tuple[str, ...] = ()

    def contents(self) -> Contents:
        """The same as arrays and plain values; settings must have all hyper-parameters here.

        Raises ParameterError where one of them has no meaning, so that nothing is saved that cannot be loaded.
        """
        check_hyper_parameters(self.settings)
        draw_seed(self.settings["random_state"])  # whether one can be drawn
        learned, params = self.learned, self.learned.params
        arrays = {"weights": params.weights, "means": params.means, "covariances": params.covariance.values}
        given = {
            name: finite_numbers(self.settings[name], name) for name in INIT_ARRAYS if self.settings[name] is not None
        }
        facts = {
            "params": {name: _plain(value) for name, value in self.settings.items() if name not in INIT_ARRAYS},
            "covariance_type": params.covariance.kind,
            "converged": learned.converged,
            "n_iter": learned.n_iter,
            "n_passes": learned.n_passes,
            "lower_bounds": [_finite(bound) for bound in learned.lower_bounds],
            "n_rows": learned.n_rows,
            "n_skipped": learned.n_skipped,
            "feature_names": list(self.feature_names),
            "provenance": dict(learned.provenance),
        }
        return Contents("model", facts, {**arrays, **given})

    @classmethod
    def of(cls, contents: Contents, name: str) -> Model:
        """What ``contents`` describe. FileFormatError, naming the file, where that is no mixture.

        Facts and arrays that this version does not know are left aside: what would change the meaning of a file has
        another format number, or is a hyper-parameter, and the estimator refuses unknown ones.
        """
        facts = contents.facts
        try:
            arrays = {key: _stored(array, key) for key, array in contents.arrays.items()}
            kind = _checked(facts["covariance_type"], str)
            params = checked_mixture(arrays["weights"], arrays["means"], arrays["covariances"], kind)
            learned = Learned(
                params,
                converged=_checked(facts["converged"], bool),
                n_iter=_count(facts["n_iter"]),
                n_passes=_count(facts["n_passes"]),
                lower_bounds=tuple(_finite(bound) for bound in _checked(facts["lower_bounds"], list)),
                n_rows=_count(facts["n_rows"]),
                n_skipped=_count(facts["n_skipped"]),
                provenance=_checked(facts["provenance"], dict),
            )
            names = tuple(_checked(feature, str) for feature in _checked(facts["feature_names"], list))
            if names and len(names) != params.n_features:
                raise ValueError(f"{len(names)} feature names for {params.n_features} features")
            given = {key: None if arrays.get(key) is None else finite_numbers(arrays[key], key) for key in INIT_ARRAYS}
            settings = {**_checked(facts["params"], dict), **given}
            draw_seed(settings.get("random_state"))
            return cls(learned, settings, names)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise FileFormatError(
                f"{name} does not describe a mixture ({error or type(error).__name__}). Take a backup, or fit again."
            ) from error


def _plain(value: Any) -> Any:
    """A number of any type as Python's own; anything else as it is."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _stored(array: np.ndarray[Any, Any], name: str) -> Floats:
    if array.dtype != np.float64:
        raise TypeError(f"{name!r:.40} holds {array.dtype} where float64 is expected")
    return array


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} where {kind.__name__} is expected")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError(f"{value!r:.40} where a count is expected")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise TypeError(f"{value!r:.40} where a finite number is expected")
    return float(value)
