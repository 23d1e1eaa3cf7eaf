"""What a fit leaves behind, as one value, and how it lies in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from streamgmm.checks import check_hyper_parameters, checked_mixture, finite_numbers
from streamgmm.errors import FileFormatError
from streamgmm.files import Contents, as_count, as_number
from streamgmm.online import Online
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

    def facts(self) -> dict[str, Any]:
        """All of it but the mixture, as plain values."""
        return {
            "covariance_type": self.params.covariance.kind,
            "converged": self.converged,
            "n_iter": self.n_iter,
            "n_passes": self.n_passes,
            "lower_bounds": [as_number(bound) for bound in self.lower_bounds],
            "n_rows": self.n_rows,
            "n_skipped": self.n_skipped,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> Learned:
        """What facts and arrays of a file describe; KeyError, TypeError or ValueError where that is no mixture."""
        return cls(
            stored_mixture(facts, arrays),
            converged=_checked(facts["converged"], bool),
            n_iter=as_count(facts["n_iter"]),
            n_passes=as_count(facts["n_passes"]),
            lower_bounds=tuple(as_number(bound) for bound in _checked(facts["lower_bounds"], list)),
            n_rows=as_count(facts["n_rows"]),
            n_skipped=as_count(facts["n_skipped"]),
            provenance=_checked(facts["provenance"], dict),
        )


@dataclass(frozen=True, eq=False)
class Model:
    """What a model file holds.

    learned: None while rows are kept for a start.  settings: the hyper-parameters.  feature_names: empty where the rows
    had none.  online: what goes from batch to batch, None where nothing does.
    """

    learned: Learned | None
    settings: Mapping[str, Any]
    feature_names: tuple[str, ...] = ()
    online: Online | None = None

    def contents(self) -> Contents:
        """The same as arrays and plain values; settings must have all hyper-parameters here.

        Raises ParameterError where one of them has no meaning, so that nothing is saved that cannot be loaded.
        """
        check_hyper_parameters(self.settings)
        draw_seed(self.settings["random_state"])  # whether one can be drawn
        given = {
            name: finite_numbers(self.settings[name], name) for name in INIT_ARRAYS if self.settings[name] is not None
        }
        facts: dict[str, Any] = {
            "params": {name: _plain(value) for name, value in self.settings.items() if name not in INIT_ARRAYS},
            "feature_names": list(self.feature_names),
        }
        arrays: dict[str, Any] = dict(given)
        if self.learned is not None:
            arrays |= mixture_arrays(self.learned.params)
            facts |= self.learned.facts()
        if self.online is not None:
            arrays |= self.online.arrays()
            facts["online"] = self.online.facts()
        return Contents("model", facts, arrays)

    @classmethod
    def of(cls, contents: Contents, name: str) -> Model:
        """What ``contents`` describe. FileFormatError, naming the file, where that is no mixture.

        Facts and arrays that this version does not know are left aside: what would change the meaning of a file has
        another format number, or is a hyper-parameter, and the estimator refuses unknown ones.
        """
        facts = contents.facts
        try:
            arrays = contents.arrays
            learned = Learned.of(facts, arrays) if "covariance_type" in facts else None
            online = None
            if "online" in facts:
                online = Online.of(facts["online"], arrays, None if learned is None else learned.params)
            if learned is None and online is None:
                raise ValueError("no mixture, and no rows for one")
            names = tuple(_checked(feature, str) for feature in _checked(facts["feature_names"], list))
            n_features = learned.params.n_features if learned else online.kept_rows.shape[1]  # type: ignore[union-attr]
            if names and len(names) != n_features:
                raise ValueError(f"{len(names)} feature names for {n_features} features")
            given = {key: None if arrays.get(key) is None else finite_numbers(arrays[key], key) for key in INIT_ARRAYS}
            settings = {**_checked(facts["params"], dict), **given}
            draw_seed(settings.get("random_state"))
            return cls(learned, settings, names, online)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
            raise FileFormatError(
                f"{name} does not describe a mixture ({error or type(error).__name__}). Take a backup, or fit again."
            ) from error


def mixture_arrays(params: MixtureParams) -> dict[str, Floats]:
    """A mixture as arrays of a file."""
    return {"weights": params.weights, "means": params.means, "covariances": params.covariance.values}


def stored_mixture(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> MixtureParams:
    """The mixture of a file; KeyError, TypeError or ValueError where it is none."""
    weights, means, covariances = (_stored(arrays[name], name) for name in ("weights", "means", "covariances"))
    return checked_mixture(weights, means, covariances, _checked(facts["covariance_type"], str))


def _plain(value: Any) -> Any:
    """A number of any type as Python's own; anything else as it is."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
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
