"""GaussianMixture: the estimator, which joins where rows come from with how they are learned."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from streamgmm import files
from streamgmm.checks import (
    check_hyper_parameters,
    checked_means,
    checked_mixture,
    checked_precisions,
    checked_weights,
)
from streamgmm.covariance import STRUCTURES, AbstractCovariance
from streamgmm.errors import (
    DataError,
    DataTypeError,
    DegenerateComponentWarning,
    FileFormatError,
    ParameterError,
    RegularisationWarning,
)
from streamgmm.executors import FAN_IN, executor_for, memory_scheduler, single_blas_thread
from streamgmm.history import PassRecord
from streamgmm.kernel import e_step, prepare, workspace_bytes
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot, take_pilot
from streamgmm.plan import Plan, make_plan
from streamgmm.prediction import LABELS, LOG_DENSITY, RESPONSIBILITIES, RowResult, lazy_rows, score_block, total_block
from streamgmm.protocols import Executor, Integers, Source
from streamgmm.solvers.em import FitResult, em
from streamgmm.sources import is_lazy, is_store, open_source, with_weights
from streamgmm.start import kmeans_start
from streamgmm.stats import SufficientStats
from streamgmm.streams import draw_seed, sample_index

logger = logging.getLogger("streamgmm")

DEFAULT_TOL = 1e-3
SMALLEST_SAMPLE = 20_000
LARGEST_SAMPLE_BYTES = 64 * 2**20
INIT_ARRAYS = ("weights_init", "means_init", "precisions_init")


class GaussianMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian mixture fitted by EM to rows in memory, in a zarr store or in a dask array, in bounded memory.

    Parameters and attributes are scikit-learn's where they have the same name. n rows, d features, k components.

    Parameters
    ----------
    n_components : int
        k, the number of components.
    covariance_type : {"full", "tied", "diag", "spherical"}
        A matrix of its own for each component, one matrix for all, variances along the axes, one variance each.
    tol : float or None
        EM stops when the mean log-likelihood (nats a row) changes by less. None: 1e-3.
    reg_covar : float
        Added to every variance, in the data's units squared.
    max_iter : int
        Most passes over the data, the pilot read not counted.
    n_init : int
        Starts. They advance together in the same passes; the one with the highest lower bound is kept.
    init_params : {"auto", "k-means++"}
        How starts are found on a sample of rows: greedy k-means++, Lloyd's iterations, then moments.
    weights_init, means_init, precisions_init : array-like or None
        Given starting values (k,), (k, d) and in the shape of ``precisions_``; with all three no start is searched.
    random_state : int, numpy RandomState or Generator, or None
        Where one 128-bit seed is drawn from for each fit.
    warm_start : bool
        Start from the parameters of the fit before, if there was one.
    verbose : int
        1 prints what the log says, every ``verbose_interval`` passes. The log is ``logging.getLogger("streamgmm")``.
    verbose_interval : int
        Passes between two printed lines.
    solver : {"auto", "em"}
        "em" is textbook EM with scikit-learn's stopping rule; "auto" is the same for now.

    Attributes
    ----------
    weights_, means_, covariances_, precisions_, precisions_cholesky_ : ndarray
        The mixture, in scikit-learn's shapes. Components keep the order of their start.
    converged_ : bool
    n_iter_ : int
        Passes that the published start took.
    lower_bound_, lower_bounds_ : float, list of float
        Mean log-likelihood a row (nats) of the parameters that entered the last pass, and each pass.
    n_passes_ : int
        Reads of the whole data, pilot included.
    n_features_in_, feature_names_in_ : int, ndarray of str
        Features, and their names where X had any.
    """

    weights_: Any
    means_: Any
    covariances_: Any
    _fitted_type: str
    _provenance: dict[str, Any]

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float | None = None,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "auto",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        solver: str = "auto",
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.solver = solver

    # -- learning ------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> Self:
        """Learn the mixture from rows X: anything that ``open_source`` takes, or an array-like (n, d).

        sample_weight: (n,) finite, at least zero; a weight counts how often its row is repeated. An array-like, a zarr
        array or its path, or a dask array, matched by row number whatever its chunks.

        The work runs where dask is set to run, with the same bits everywhere: a client's cluster, processes, threads,
        or the calling thread. Rows in memory stay on threads of this process.

        Raises DataError (a ValueError) for rows that cannot be learned from, ParameterError for hyper-parameters
        without meaning, NumericalError where a covariance degenerates, SourceError where a store cannot be read,
        MemoryPlanError where the work would not fit, SchedulerError where dask is set to a scheduler that cannot be
        used, and ClusterError where the processes that work are gone or stand still. Warns with
        ConvergenceWarning where ``max_iter`` ended the fit.
        """
        before = dict(self.__dict__)
        try:
            with single_blas_thread():
                result = self._fit(X, sample_weight)
        except BaseException:
            # what was learned before, and its features, stay as they were
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self._warn_result(result)
        return self

    def _fit(self, X: Any, sample_weight: Any) -> FitResult:
        check_hyper_parameters(self.get_params(deep=False))
        seed = draw_seed(self.random_state)
        opened = self._open(X, sample_weight, reset=True)
        with executor_for(opened) as executor:
            executor.everywhere(opened.checks)
            source = self._counted(opened, executor)
            plan, size = self._plan(source, executor)
            for line in (str(plan), *plan.remarks):
                self._say(line, printed=True)
            executor = executor.sized(plan.blocks_per_task)
            pilot = take_pilot(source, executor, _sample_rows(source.n_rows, sample_weight, seed, size))
            self._warn_regularisation(pilot)
            result = self._solve(source, executor, pilot, seed)
        self._publish(result, seed, plan)
        self.n_passes_ += opened.name in opened.uncounted
        return result

    def plan(self, X: Any) -> Plan:
        """What a pass over X would read and how much memory it would take. Reads no row; MemoryPlanError as in fit."""
        check_hyper_parameters(self.get_params(deep=False))
        source = open_source(X if is_store(X) or is_lazy(X) else np.asarray(X))
        with executor_for(source) as executor:
            return self._plan(source, executor)[0]

    def fit_predict(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> Any:
        """Fit, then the label of every row: the component with the largest responsibility."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def _open(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Source:
        """The source of X; sets n_features_in_ where ``reset``, else refuses another number of features."""
        if is_store(X) or is_lazy(X):
            if reset:
                self.__dict__.pop("feature_names_in_", None)
        else:
            if np.ma.is_masked(X):
                raise DataTypeError(
                    "The array is masked, and some of its values are. Fill them in, or drop those rows."
                )
            X = validate_data(
                self, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=2 if reset else 1
            )
        source = open_source(X)
        if reset:
            self.n_features_in_ = source.n_features
        elif source.n_features != self.n_features_in_:
            raise DataError(
                f"{source.name} has {source.n_features} features, but GaussianMixture is expecting "
                f"{self.n_features_in_} features as input. Give the features that the model was fitted on."
            )
        return with_weights(source, sample_weight)

    def _counted(self, source: Source, executor: Executor) -> Source:
        """The source with its rows counted, where that takes a read, and enough of them."""
        for name in source.uncounted:
            self._say(
                f"{name} does not know its chunk sizes: one more read counts its rows. compute_chunk_sizes() would "
                "save it where the array is fitted more than once.",
                printed=True,
            )
        source = source.counted(executor)
        if source.n_rows < 2:
            raise DataError(f"{source.name} has 1 row, but a minimum of 2 is required to fit a mixture.")
        if source.n_rows < self.n_components:
            raise DataError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, n_samples = "
                f"{source.n_rows}. Lower n_components, or give more rows."
            )
        return source

    def _plan(self, source: Source, executor: Executor) -> tuple[Plan, int]:
        """The plan of a pass, and the rows of the sample."""
        k, d, structure = self.n_components, source.n_features, STRUCTURES[self.covariance_type]
        size = min(source.n_rows, max(SMALLEST_SAMPLE, 100 * k * (d + 1)), LARGEST_SAMPLE_BYTES // (8 * d))
        return self._pass_plan(source, executor, k, structure, self.n_init, size), size

    @staticmethod
    def _pass_plan(
        source: Source,
        executor: Executor,
        k: int,
        structure: type[AbstractCovariance],
        models: int = 1,
        sample: int = 0,
    ) -> Plan:
        """The plan of a pass with ``models`` mixtures of k components, and a sample of so many rows."""
        d = source.n_features
        return make_plan(
            source,
            executor.capacity,
            fan_in=FAN_IN,
            workspace_bytes=workspace_bytes(structure, k, d, models),
            value_bytes=8 * k * (1 + d + structure.quadratic.size(d)) * models,
            sample_bytes=8 * sample * (4 * d + 4 * k),
            carried_bytes=2 * 8 * sample * d,
        )

    def _solve(self, source: Source, executor: Executor, pilot: Pilot, seed: int) -> FitResult:
        structure = STRUCTURES[self.covariance_type]
        frame, blocks = pilot.frame(isotropic=structure.isotropic), source.blocks()

        def read(models: tuple[MixtureParams, ...]) -> tuple[SufficientStats, ...]:
            scorers = tuple(prepare(model, frame) for model in models)
            return executor.map_reduce(e_step, scorers, blocks, source.graph).values

        return em(
            read,
            self._starts(structure, pilot, seed),
            tol=self._tol(),
            max_iter=self.max_iter,
            reg_covar=self.reg_covar,
            report=self._report,
        )

    def _starts(self, structure: type[AbstractCovariance], pilot: Pilot, seed: int) -> list[MixtureParams]:
        """The starting parameters of each restart: those of the last fit, given ones, or moments of clusters."""
        k, d = self.n_components, len(pilot.mean)
        if self.warm_start and hasattr(self, "weights_"):
            return [self._last_params(structure, k, d)]
        weights = None if self.weights_init is None else checked_weights(self.weights_init, k, "weights_init")
        means = None if self.means_init is None else checked_means(self.means_init, k, d, "means_init")
        precisions = self.precisions_init
        covariance = None if precisions is None else checked_precisions(precisions, structure, k, d)
        if weights is not None and means is not None and covariance is not None:
            return [MixtureParams(weights, means, covariance)]
        if len(pilot.sample) < k:
            raise DataError(
                f"Only {len(pilot.sample)} of the rows that were drawn for the start have a weight above zero, but "
                f"n_components={k}. Give sample_weight as an array in memory, so that rows are drawn among those that "
                "count, or give weights_init, means_init and precisions_init."
            )
        self._say(f"seeking {self.n_init} start(s) on a sample of {len(pilot.sample):,} rows", printed=False)
        found = [kmeans_start(pilot, structure, k, seed, index) for index in range(self.n_init)]
        return [
            MixtureParams(
                start.weights if weights is None else weights,
                start.means if means is None else means,
                start.covariance if covariance is None else covariance,
            )
            for start in found
        ]

    def _last_params(self, structure: type[AbstractCovariance], k: int, d: int) -> MixtureParams:
        """The parameters of the fit before, for a warm start."""
        if np.shape(self.means_) != (k, d) or self._fitted_type != structure.kind:
            raise ParameterError(
                f"warm_start continues from means of shape {np.shape(self.means_)} and {self._fitted_type!r} "
                f"covariances, but this fit has {k} components in {d} features with covariance_type="
                f"{structure.kind!r}. Set warm_start=False, or give the parameters back their old values."
            )
        return self._params()

    def _publish(self, result: FitResult, seed: int, plan: Plan) -> None:
        self._set_params(result.params)
        self.converged_ = result.converged
        self.n_iter_ = len(result.lower_bounds)
        self.lower_bounds_ = list(result.lower_bounds)
        self.lower_bound_ = result.lower_bound
        self.n_passes_ = result.n_passes + 1
        self._provenance = {
            "seed": f"{seed:032x}",
            "block_rows": plan.block_rows,
            "n_rows": plan.n_rows,
        }

    def _warn_result(self, result: FitResult) -> None:
        if result.starved:
            warnings.warn(
                f"Components {list(result.starved)} have lost all their rows and keep their last mean and covariance. "
                "Lower n_components, or try another random_state.",
                DegenerateComponentWarning,
                stacklevel=3,
            )
        if not result.converged and self.max_iter > 0:
            warnings.warn(
                f"The fit did not converge in {self.max_iter} passes: {_last_change(self.lower_bounds_)}, and "
                f"tol={self._tol():g}. Raise max_iter or tol, try another start, or check for degenerate data.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _tol(self) -> float:
        return DEFAULT_TOL if self.tol is None else self.tol

    def _warn_regularisation(self, pilot: Pilot) -> None:
        variances = np.diagonal(pilot.covariance)
        feature = int(np.argmin(variances))
        if self.reg_covar > 0.01 * variances[feature]:
            warnings.warn(
                f"reg_covar={self.reg_covar:g} is more than 1 % of the variance of feature {feature} "
                f"({variances[feature]:.3g}) and shapes the result. Lower reg_covar, rescale the feature, or drop it.",
                RegularisationWarning,
                stacklevel=3,
            )

    def _report(self, record: PassRecord) -> None:
        last = record.converged or record.iteration == self.max_iter
        self._say(str(record), printed=last or record.iteration % self.verbose_interval == 0)

    def _say(self, line: str, *, printed: bool) -> None:
        logger.info(line)
        if self.verbose and printed:
            print(line)

    # -- using what was learned ------------------------------------------------------------------------------------

    def predict(self, X: Any) -> Any:
        """Labels (n,) int64: in memory for rows in memory; else a lazy dask array with the row chunks of X."""
        return self._rows(X, LABELS)

    def predict_proba(self, X: Any) -> Any:
        """Responsibilities (n, k), in memory or lazy as in ``predict``."""
        return self._rows(X, RESPONSIBILITIES)

    def score_samples(self, X: Any) -> Any:
        """Log densities (n,) in nats, in memory or lazy as in ``predict``."""
        return self._rows(X, LOG_DENSITY)

    def score(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> float:
        """Mean log-likelihood a row, in nats; weighted where weights are given."""
        log_likelihood, weight = self._totals(X, sample_weight)
        return log_likelihood / weight

    def bic(self, X: Any) -> float:
        """Bayesian information criterion -2 log L + P log n (Schwarz 1978): lower is better."""
        log_likelihood, n_rows = self._totals(X)
        return float(-2.0 * log_likelihood + self._params().n_parameters * np.log(n_rows))

    def aic(self, X: Any) -> float:
        """Akaike information criterion -2 log L + 2 P (Akaike 1974): lower is better."""
        log_likelihood, _ = self._totals(X)
        return float(-2.0 * log_likelihood + 2.0 * self._params().n_parameters)

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """n_samples rows (n, d) drawn from the mixture, component by component, and their labels (n,)."""
        check_is_fitted(self, "weights_")
        if n_samples < 1:
            raise DataError(f"n_samples must be at least 1, but it is {n_samples}.")
        params = self._params()
        k, d = params.means.shape
        rng = np.random.default_rng(draw_seed(self.random_state))
        labels = np.repeat(np.arange(k), rng.multinomial(n_samples, params.weights / params.weights.sum()))
        rows = rng.standard_normal((n_samples, d))
        for j, factor in enumerate(np.linalg.cholesky(params.covariance.dense(k, d))):
            rows[labels == j] = params.means[j] + rows[labels == j] @ factor.T
        return rows, labels

    def _rows(self, X: Any, result: RowResult) -> Any:
        check_is_fitted(self, "weights_")
        source = self._open(X)
        params = self._params()
        scorer = prepare(params, params.frame())
        if not source.in_memory:
            return lazy_rows(scorer, result, source)
        with single_blas_thread():
            if source.n_rows <= source.block_rows:
                return score_block(scorer, result, source.block(0, source.n_rows))
            return lazy_rows(scorer, result, source).compute(scheduler=memory_scheduler())

    def _totals(self, X: Any, sample_weight: Any = None) -> tuple[float, float]:
        """Log-likelihood and weight of all rows."""
        check_is_fitted(self, "weights_")
        source, params = self._open(X, sample_weight), self._params()
        with single_blas_thread(), executor_for(source) as executor:
            executor.everywhere(source.checks)
            if sample_weight is not None:
                source = source.counted(executor)
            if not source.uncounted:
                plan = self._pass_plan(source, executor, params.n_components, type(params.covariance))
                executor = executor.sized(plan.blocks_per_task)
            totals = executor.map_reduce(total_block, prepare(params, params.frame()), source.blocks(), source.graph)
        if not totals.weight > 0:
            raise DataError(f"All rows of {source.name} have weight zero. At least one must count for something.")
        return totals.log_likelihood, totals.weight

    def _params(self) -> MixtureParams:
        check_is_fitted(self, "weights_")
        return MixtureParams(self.weights_, self.means_, STRUCTURES[self._fitted_type](self.covariances_))

    def _set_params(self, params: MixtureParams) -> None:
        k, d = params.means.shape
        covariance = params.covariance
        # the hyper-parameter may be set anew before the next fit
        self._fitted_type = covariance.kind
        self.weights_, self.means_ = params.weights.copy(), params.means.copy()
        self.covariances_ = covariance.values.copy()
        self.precisions_ = covariance.precisions(k, d)
        self.precisions_cholesky_ = covariance.precisions_cholesky(k, d)

    # -- in and out ------------------------------------------------------------------------------------------------

    @classmethod
    def from_parameters(
        cls, weights: Any, means: Any, covariances: Any, *, covariance_type: str = "full"
    ) -> GaussianMixture:
        """A fitted model from weights (k,), means (k, d) and covariances in the shape of ``covariance_type``.

        Raises ParameterError where a shape is wrong, weights do not sum to one, or a covariance is not positive
        definite.
        """
        params = checked_mixture(weights, means, covariances, covariance_type)
        model = cls(params.n_components, covariance_type=covariance_type)
        model._set_params(params)
        model.n_features_in_ = params.n_features
        model.converged_, model.n_iter_, model.n_passes_ = False, 0, 0
        model.lower_bound_, model.lower_bounds_ = -np.inf, []
        model._provenance = {}
        return model

    def save(self, path: str | Path) -> None:
        """Write the model to one safetensors file: the file at ``path`` is whole at every moment, old or new."""
        check_is_fitted(self, "weights_")
        params = self.get_params(deep=False)
        arrays = {"weights": self.weights_, "means": self.means_, "covariances": self.covariances_}
        given = {name: np.asarray(params.pop(name), float) for name in INIT_ARRAYS if params[name] is not None}
        if not isinstance(self.random_state, (int, np.integer)):
            params["random_state"] = None  # a generator's state is not part of what was learned
        facts = {
            "params": {name: _plain(value) for name, value in params.items() if name not in INIT_ARRAYS},
            "covariance_type": self._fitted_type,
            "converged": bool(self.converged_),
            "n_iter": self.n_iter_,
            "n_passes": self.n_passes_,
            "lower_bounds": [float(bound) for bound in self.lower_bounds_],
            "feature_names": [str(name) for name in getattr(self, "feature_names_in_", [])],
            "provenance": self._provenance,
        }
        files.write(path, files.Contents("model", facts, {**arrays, **given}))


def load(path: str | Path) -> GaussianMixture:
    """The model saved at ``path``. FileFormatError where the file is damaged, foreign or from a newer version."""
    contents = files.read(path, "model")
    facts, arrays = contents.facts, contents.arrays
    try:
        covariance_type = facts["covariance_type"]
        model = GaussianMixture.from_parameters(
            arrays["weights"], arrays["means"], arrays["covariances"], covariance_type=covariance_type
        )
        model.set_params(**facts["params"], **{name: arrays.get(name) for name in INIT_ARRAYS})
        model.converged_, model.n_iter_, model.n_passes_ = facts["converged"], facts["n_iter"], facts["n_passes"]
        model.lower_bounds_ = facts["lower_bounds"]
        model.lower_bound_ = model.lower_bounds_[-1] if model.lower_bounds_ else -np.inf
        model._provenance = facts["provenance"]
        if facts["feature_names"]:
            model.feature_names_in_ = np.asarray(facts["feature_names"], dtype=object)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{Path(path).name} does not describe a mixture ({error}). Take a backup, or fit again."
        ) from error
    return model


def _last_change(lower_bounds: list[float]) -> str:
    if len(lower_bounds) < 2:
        return "one pass cannot tell by how much the mean log-likelihood still changes"
    return f"the mean log-likelihood last changed by {lower_bounds[-1] - lower_bounds[-2]:.3g} nats a row"


def _sample_rows(n_rows: int, sample_weight: Any, seed: int, size: int) -> Integers:
    """Rising numbers of the rows of the sample, drawn among those that count for something.

    Weights that are not in memory are not loaded for that: the sample then loses the rows that have weight zero.
    """
    if sample_weight is None or is_store(sample_weight):
        return sample_index(seed, n_rows, size)
    counted = np.flatnonzero(np.asarray(sample_weight, dtype=np.float64))
    return counted[sample_index(seed, len(counted), size)]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
