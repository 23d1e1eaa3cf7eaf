"""Models from and to scikit-learn's own Gaussian mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from streamgmm.checks import checked_mixture
from streamgmm.errors import DataTypeError
from streamgmm.learned import Learned, Model

#: Hyper-parameters that both have under the same name and with the same values.
SHARED = (
    "n_components", "covariance_type", "reg_covar", "max_iter", "n_init", "weights_init", "means_init",
    "precisions_init", "random_state", "warm_start", "verbose", "verbose_interval",
)  # fmt: skip

#: Ways to find a start that both know; ours are "kmeans" in scikit-learn's words otherwise.
STARTS = ("kmeans", "k-means++", "random", "random_from_data")


def from_sklearn(model: Any) -> Model:
    """The mixture of a fitted ``sklearn.mixture.GaussianMixture``; see the estimator's method."""
    from sklearn.mixture import GaussianMixture as Reference  # a quarter of a second, for those who ask

    if not isinstance(model, Reference):
        raise DataTypeError(
            f"A fitted sklearn.mixture.GaussianMixture is expected, but a {type(model).__name__} was given. Of another "
            "mixture take GaussianMixture.from_parameters(weights, means, covariances)."
        )
    check_is_fitted(model)
    covariances = _mirrored(model.covariances_, model.covariance_type)
    params = checked_mixture(model.weights_, model.means_, covariances, model.covariance_type)
    bounds = getattr(model, "lower_bounds_", [model.lower_bound_])  # scikit-learn 1.6 keeps the last one only
    learned = Learned(
        params,
        converged=bool(model.converged_),
        n_iter=int(model.n_iter_),
        lower_bounds=tuple(float(bound) for bound in bounds if np.isfinite(bound)),
    )
    settings = {name: getattr(model, name) for name in (*SHARED, "tol", "init_params")}
    return Model(learned, settings, tuple(map(str, getattr(model, "feature_names_in_", ()))))


def to_sklearn(learned: Learned, settings: Mapping[str, Any], feature_names: tuple[str, ...]) -> Any:
    """A fitted ``sklearn.mixture.GaussianMixture``; see the estimator's method."""
    from sklearn.mixture import GaussianMixture as Reference

    params = learned.params
    k, d = params.means.shape
    start = settings["init_params"] if settings["init_params"] in STARTS else "kmeans"
    reference = Reference(
        **{name: settings[name] for name in SHARED},
        tol=1e-3 if settings["tol"] is None else settings["tol"],
        init_params=start,
    )
    reference.set_params(n_components=k, covariance_type=params.covariance.kind)
    reference.weights_, reference.means_ = params.weights.copy(), params.means.copy()
    reference.covariances_ = params.covariance.values.copy()
    reference.precisions_ = params.covariance.precisions(k, d)
    # BLAS rounds by the order in memory: a file keeps this one, so a loaded copy has the same bits
    reference.precisions_cholesky_ = np.array(params.covariance.precisions_cholesky(k, d), order="C")
    reference.converged_, reference.n_iter_ = learned.converged, learned.n_iter
    reference.lower_bound_, reference.lower_bounds_ = learned.lower_bound, list(learned.lower_bounds)
    reference.n_features_in_ = d
    if feature_names:
        reference.feature_names_in_ = np.asarray(feature_names, dtype=object)
    return reference


def _mirrored(covariances: Any, covariance_type: str) -> Any:
    """Matrices made of their lower triangles, which are all that scikit-learn looks at.

    The upper ones differ by rounding, after a float32 fit by far more than what passes for symmetric here.
    """
    if covariance_type not in ("full", "tied"):
        return covariances
    lower = np.tril(covariances)
    return lower + np.swapaxes(np.tril(covariances, -1), -1, -2)
