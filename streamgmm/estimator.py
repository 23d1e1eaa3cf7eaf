"""GaussianMixture: the estimator, the face of scikit-learn's contract."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from streamgmm import files, interop
from streamgmm.checkpoint import Keeper, identity_of, require_keepable
from streamgmm.checks import check_hyper_parameters, checked_mixture
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import (
    DataError,
    DataTypeError,
    DegenerateComponentWarning,
    FileFormatError,
    MemoryPlanError,
    ParameterError,
    SampleWarning,
    shown,
    warn,
)
from streamgmm.executors import executor_for, memory_scheduler, single_blas_thread
from streamgmm.fitting import Fit, fit, fit_plan, pass_plan, sample_size
from streamgmm.history import Log, PassRecord
from streamgmm.kernel import prepare
from streamgmm.learned import Learned, Model
from streamgmm.learning import of_mixture
from streamgmm.ledger import Ledger
from streamgmm.merging import Statistics
from streamgmm.online import Online
from streamgmm.params import MixtureParams
from streamgmm.plan import Plan, machine_bytes
from streamgmm.prediction import LABELS, LOG_DENSITY, RESPONSIBILITIES, RowResult, lazy_rows, score_block, total_block
from streamgmm.protocols import Executor, Source
from streamgmm.settings import Settings
from streamgmm.sources import is_lazy, is_store, open_source, require_unmasked, stored, with_weights
from streamgmm.streams import Purpose, draw_seed, stream
from streamgmm.summary import Summary
from streamgmm.updating import Updating


class GaussianMixture(Updating, DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian mixture fitted by EM to rows in memory, in a zarr store or in a dask array, in bounded memory.

    Parameters and attributes are scikit-learn's where they have the same name. n rows, d features, k components.

    Parameters
    ----------
    n_components : int
        k, the number of components.
    covariance_type : {"full", "tied", "diag", "spherical"}
        A matrix of its own for each component, one matrix for all, variances along the axes, one variance each.
    tol : float or None
        How near the optimum the fit ends, nats a row. solver="auto" stops where twice the predicted gap to the optimum
        is at most this; None: 0.1 P / 2n, a tenth of the statistical error of the exact estimate (P free parameters, n
        rows); 0: after ``max_iter`` passes. Other solvers stop where the mean log-likelihood changes by less; None:
        1e-3.
    reg_covar : float
        Added to every variance, in the data's units squared.
    max_iter : int
        Most passes over the data, the pilot read not counted. Steps on the sample are no passes.
    n_init : int
        Starts. solver="auto" follows each to its optimum on the sample, at no read, and the best one further; with
        "em" they advance together in the same passes, and the one with the highest lower bound is kept.
    init_params : {"auto", "split", "k-means++", "kmeans", "vq", "random_from_data", "samples", "random"}
        How starts are found on a sample of rows. "split": from one component, the one is split in two that gains the
        most, until there are k. "k-means++": greedy k-means++, Lloyd's iterations, then the moments of the clusters;
        "kmeans": the best of several of these. "auto": the first start by "split", or "kmeans" where one matrix is for
        all or there are less than 10 rows for each free parameter, and others by "k-means++". "vq": a codebook grown by
        splitting, on which far rows pull less, then the moments of its cells. "random_from_data": the moments of the
        rows nearest to each of k random ones. "samples": mean and variances of a few random rows each. "random": the
        moments under random responsibilities.
    weights_init, means_init, precisions_init : array-like or None
        Given starting values (k,), (k, d) and in the shape of ``precisions_``; with all three no start is searched, and
        with solver="auto" the order of the rows does not matter but for rounding, unless many are copies of each other.
    random_state : int, numpy RandomState or Generator, or None
        Where one 128-bit seed is drawn from for each fit, and for each ``sample``. The seed of a fit is saved with the
        model. An integer gives the same seed each time; None a fresh one.
    warm_start : bool
        Start from the parameters of the fit before, if there was one.
    verbose : int
        1 prints the plan and a line every ``verbose_interval`` passes, 2 the seconds that a pass took as well. The log
        ``logging.getLogger("streamgmm")`` has all of it at level INFO, with a line for every pass.
    verbose_interval : int
        Passes between two printed lines.
    solver : {"auto", "em", "incremental"}
        "auto" needs few reads. After each read it makes EM steps on a sample of the rows in memory, weighted so that it
        tells what all rows told, as far as a lower confidence bound of the likelihood rises. A read that finds a lower
        likelihood is taken back. Where the sample holds all rows they are read once; where it has fewer than 30 rows
        for each free parameter, accelerated EM reads all rows again and again. "em" is textbook EM with scikit-learn's
        stopping rule. "incremental" (Neal & Hinton 1998) keeps the statistics of every block of the rows, in memory up
        to 64 MiB and else in a temporary file, and makes up to 40 M-steps a pass, whatever the order of the rows.
        Starts run one after the other. Its lower bounds are those of the parameters after each pass: the free energy,
        which is at most their mean log-likelihood and never falls, but for what ``reg_covar`` adds.
    step_exponent : float
        In (0.5, 1]. Batches that are learned one by one remember memory^exponent rows once there are many: with 1 all
        rows count alike for ever; less forgets what was learned from with poorer parameters.
    forgetting : None, float, {"half_life": rows} or {"effective_rows": rows}
        Old rows fade at least so fast: the share that every row forgets, the rows after which a row counts half, or the
        rows of equal weight that are remembered. For rows that change with time.
    average : bool
        Publish an average of the running statistics, the later the heavier. For rows that stay alike.
    prior_rows : float or None
        Rows that a given mixture counts for when batches are learned after it. None: 30 for every free parameter.
    sample_rows : int or None
        Rows of the sample; about as many where a whole start is given. None: 300 for every free parameter where they
        take at most 64 MiB, else 100; at least 20,000, and at most 512 MiB. For "em" and "incremental", which only seek
        their starts on it: 100 k (d + 1).
    compute_dtype : {"float64", "float32"}
        In what passes over the data make features, densities and matrix products; sums are always float64. "float32" is
        faster, and mostly good to 1e-6 nats a row and 1e-6 of a deviation, to 1e-4 at worst. Where it would be worse,
        because components are narrow beside all of the data or rows are far out, float64 is taken all the same. The
        sample, what is learned batch by batch, and predictions are always in float64.

    Attributes
    ----------
    weights_, means_, covariances_, precisions_, precisions_cholesky_ : ndarray
        The mixture, in scikit-learn's shapes. Components keep the order of their start.
    converged_ : bool
    n_iter_ : int
        Passes that the published start took.
    lower_bound_, lower_bounds_ : float, list of float
        Mean log-likelihood a row (nats) of the best parameters that a pass has seen, at the end and after each pass;
        with ``solver="em"`` of those that entered it; of each step where all rows are in the sample.
    history_ : list of PassRecord
        What each pass did: its log-likelihood, the predicted gap, rows, bytes and seconds, steps on the sample, whether
        it was rejected, the start it comes from. Not part of a saved model.
    n_passes_ : int
        Reads of the whole data, pilot included.
    n_rows_, n_skipped_ : int
        Rows learned from, and rows left out because of NaN (see ``open_source``).
    n_features_in_, feature_names_in_ : int, ndarray of str
        Features, and their names where X had any.
    n_steps_, n_stream_, effective_rows_ : int, int, float
        Batches learned in a step, those of them that came from a stream, and rows of equal weight that are remembered.
    report_ : BatchReport
        What the last batch was like, beside what was expected, and what it changed.
    """

    weights_: Any
    means_: Any
    covariances_: Any
    history_: list[PassRecord]
    _fitted_type: str
    _provenance: Any

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
        step_exponent: float = 0.9,
        forgetting: Any = None,
        average: bool = False,
        prior_rows: float | None = None,
        sample_rows: int | None = None,
        compute_dtype: str = "float64",
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
        self.step_exponent = step_exponent
        self.forgetting = forgetting
        self.average = average
        self.prior_rows = prior_rows
        self.sample_rows = sample_rows
        self.compute_dtype = compute_dtype

    # -- learning ------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None, checkpoint: str | Path | None = None) -> Self:
        """Learn the mixture from rows X: anything that ``open_source`` takes, or an array-like (n, d).

        sample_weight: (n,) finite, at least zero; a weight counts how often its row is repeated. An array-like, a zarr
        array or its path, or a dask array, matched by row number whatever its chunks.

        checkpoint: a path. After every read the file there is replaced by one with all that the fit goes on from, and
        the same call goes on from it: to the same bits where nothing else has changed, and no read is repeated. It is
        bound to the rows, the parameters but ``max_iter``, and the seed; another fit is refused with the differences.
        Rows and weights in memory are all looked at. Of a store, the sizes and times of its chunks are compared, and
        its first and last block read. Of a dask array 16 blocks are read, spread evenly: changes in others are not
        seen. Where ``random_state`` is a generator, its state is the seed, which every call moves on.
        KeyboardInterrupt leaves what the finished reads found in the attributes, with or without a checkpoint. Ctrl-C
        waits for the chunk that is being read, on threads for the tasks that are running.

        The work runs where dask is set to run, with the same bits everywhere: a client's cluster, processes, threads,
        or the calling thread. Rows in memory stay on threads of this process.

        Raises DataError (a ValueError) for rows that cannot be learned from, DataTypeError (a TypeError) where they
        are no real numbers, ParameterError for hyper-parameters without meaning, NumericalError where a covariance
        degenerates, SourceError where a store cannot be read, MemoryPlanError where the work would not fit,
        SchedulerError where dask is set to a scheduler that cannot be used, and ClusterError where the processes that
        work are gone or stand still. Warns with ConvergenceWarning where ``max_iter`` ended the fit.
        """
        with self._unchanged_on_error(), single_blas_thread():
            found = self._fit(X, sample_weight, checkpoint)
        if found.interrupt is not None:
            raise found.interrupt
        self._warn(found)
        return self

    def _fit(self, X: Any, sample_weight: Any, checkpoint: str | Path | None = None) -> Fit:
        settings = Settings.of(self.get_params(deep=False))
        log = Log(int(self.verbose), int(self.verbose_interval), int(self.max_iter))
        last = self._last()
        seed = draw_seed(self.random_state)
        source = self._open(X, sample_weight, reset=True)

        def keeper(source: Source, executor: Executor) -> Keeper:
            if checkpoint is None:
                return Keeper(None, seed, {})
            identity = identity_of(source, executor, self.get_params(deep=False), last)
            return Keeper.opened(checkpoint, seed, identity, any_seed=self.random_state is None)

        if checkpoint is not None:
            require_keepable(settings.solver, checkpoint)
        found = fit(source, settings, log, keeper, sample_weight=sample_weight, last=last)
        self._learn(found.learned)
        self.__dict__.pop("report_", None)  # of what was learned before, which is no more
        self.history_ = log.records
        running = found.running
        if running is None and found.record is not None:  # not one pass, but the rows were read, and count as learned
            running = of_mixture(found.learned.params, settings)
        if running is not None:
            ledger = Ledger() if found.record is None else Ledger((found.record,))
            online = Online.started(running, self.n_rows_, self.n_skipped_, ledger)
            self._online = replace(online, remembered=found.remembered)
        return found

    def plan(self, X: Any) -> Plan:
        """What a pass over X would read and how much memory it would take. Reads no row; MemoryPlanError as in fit."""
        settings = Settings.of(self.get_params(deep=False))
        source = open_source(X if is_store(X) or is_lazy(X) else _array(X))
        with executor_for(source) as executor:
            given = self._last() is not None or not settings.seeks_start
            return fit_plan(source, executor, settings, sample_size(source, settings), given=given)

    def _last(self) -> MixtureParams | None:
        """Where a warm start begins."""
        return self._params() if self.warm_start and hasattr(self, "weights_") else None

    def fit_predict(self, X: Any, y: Any = None, *, sample_weight: Any = None) -> Any:
        """Fit, then the label of every row: the component with the largest responsibility."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def _open(self, X: Any, sample_weight: Any = None, *, reset: bool = False, least_rows: int = 0) -> Source:
        """The source of X; sets n_features_in_ where ``reset``, else refuses another number of features.

        least_rows: of rows in memory; two where ``reset`` and nothing is said.
        """
        if is_store(X) or is_lazy(X):
            if reset:
                self.__dict__.pop("feature_names_in_", None)
        else:
            require_unmasked(X, "the array")
            X = self._validated(X, reset=reset, least_rows=least_rows or (2 if reset else 1))
        source = open_source(X)
        rows = stored(source)
        if rows is not None and rows.reading.waits:
            rows.require_complete()
        self._require_features(source, reset=reset)
        return with_weights(source, sample_weight)

    def _require_features(self, source: Source, *, reset: bool) -> None:
        if reset:
            self.n_features_in_ = source.n_features
        elif source.n_features != self.n_features_in_:
            raise DataError(
                f"{source.name} has {source.n_features} features, but GaussianMixture is expecting "
                f"{self.n_features_in_} features as input. Give the features that the model was fitted on."
            )

    def _validated(self, X: Any, *, reset: bool, least_rows: int) -> Any:
        """Rows in memory as an array; feature names are kept, or compared. DataError or DataTypeError if it is none."""
        try:
            return validate_data(
                self, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=least_rows
            )
        except TypeError as error:
            raise DataTypeError(str(error)) from error
        except (ValueError, OverflowError) as error:
            raise DataError(str(error)) from error

    def _learn(self, learned: Learned) -> None:
        """Publish what was learned as attributes."""
        params = learned.params
        k, d = params.means.shape
        self._online = None
        # the hyper-parameter may be set anew before the next fit
        self._fitted_type = params.covariance.kind
        self.weights_, self.means_ = params.weights.copy(), params.means.copy()
        self.covariances_ = params.covariance.values.copy()
        self.precisions_ = params.covariance.precisions(k, d)
        self.precisions_cholesky_ = np.array(params.covariance.precisions_cholesky(k, d), order="C")
        self.converged_, self.n_iter_, self.n_passes_ = learned.converged, learned.n_iter, learned.n_passes
        self.lower_bound_, self.lower_bounds_ = learned.lower_bound, list(learned.lower_bounds)
        self.n_rows_, self.n_skipped_ = learned.n_rows, learned.n_skipped
        self.history_ = []
        self.n_features_in_ = d
        self._provenance = learned.provenance

    def _learned(self, params: MixtureParams | None = None) -> Learned:
        """What was learned, from the attributes; ``params`` where they say more exactly which mixture it is."""
        return Learned(
            self._params() if params is None else params,
            converged=bool(self.converged_),
            n_iter=int(self.n_iter_),
            n_passes=int(self.n_passes_),
            lower_bounds=tuple(map(float, self.lower_bounds_)),
            n_rows=int(self.n_rows_),
            n_skipped=int(self.n_skipped_),
            provenance=self._provenance,
        )

    def _warn(self, found: Fit) -> None:
        learned = found.learned
        if found.starved:
            warn(
                f"Components {list(found.starved)} have lost all their rows and keep their last mean and covariance. "
                "Lower n_components, or try another random_state.",
                DegenerateComponentWarning,
            )
        if not learned.converged and self.max_iter > 0:
            what = "steps" if learned.n_passes <= learned.n_iter else "passes"
            warn(
                f"The fit did not converge in {learned.n_iter} {what}: {_what_is_missing(found)}, and it ends at "
                f"{found.enough:.3g} or less. Raise max_iter above {learned.n_iter}, raise tol, try another start, or "
                "check for degenerate data.",
                ConvergenceWarning,
            )
        if not isnan(found.first_gap):
            warn(
                f"The optimum of the sample was {found.first_gap:.3g} nats a row below what all rows allow, much more "
                "than its size explains: the sample may lack a rare component, or have led to a poor optimum. Raise "
                "sample_rows or n_init.",
                SampleWarning,
            )

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
        if isinstance(n_samples, bool) or not isinstance(n_samples, Integral) or n_samples < 1:
            raise ParameterError(f"n_samples must be a whole number of at least 1, but it is {shown(n_samples)}.")
        params = self._params()
        d = params.n_features
        if 2 * 8 * n_samples * d > machine_bytes():
            raise MemoryPlanError(
                f"{shown(n_samples)} rows of {d} features do not fit into this machine's memory. Draw them in parts."
            )
        return params.draw(n_samples, stream(draw_seed(self.random_state), Purpose.SAMPLES))

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
                plan = pass_plan(source, executor, params.n_components, type(params.covariance))
                executor = executor.sized(plan.blocks_per_task)
            totals = executor.map_reduce(total_block, prepare(params, params.frame()), source.blocks(), source.graph)
        if not totals.weight > 0:
            raise DataError(
                f"All rows of {source.name} have weight zero, or NaN and are left out. At least one must count."
            )
        return totals.log_likelihood, totals.weight

    def _params(self) -> MixtureParams:
        check_is_fitted(self, "weights_")
        return MixtureParams(self.weights_, self.means_, STRUCTURES[self._fitted_type](self.covariances_))

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
        model._learn(Learned(params))
        return model

    @classmethod
    def from_sklearn(cls, model: Any) -> GaussianMixture:
        """A fitted model from a fitted ``sklearn.mixture.GaussianMixture``, with its parameters and feature names.

        Raises DataTypeError where ``model`` is another kind of estimator, NotFittedError where it is not fitted,
        ParameterError where its mixture is none.
        """
        return cls._of(interop.from_sklearn(model))

    def to_sklearn(self) -> Any:
        """The same mixture as a fitted ``sklearn.mixture.GaussianMixture``: for joblib, skops, ONNX and pipelines.

        What scikit-learn has no word for, such as ``solver``, stays behind.
        """
        model = self._model()
        return interop.to_sklearn(self._learned(), model.settings, model.feature_names)

    def save(self, path: str | Path) -> None:
        """Write the model to one safetensors file: the file at ``path`` is whole at every moment, old or new.

        Raises FileFormatError where there is no such folder, or ``path`` is something else than a file.
        """
        files.write(path, self._model().contents())

    def _model(self) -> Model:
        if self._online is None:
            check_is_fitted(self, "weights_")
        settings = self.get_params(deep=False)
        if not isinstance(self.random_state, (int, np.integer)):
            settings["random_state"] = None  # a generator's state is not part of what was learned
        names = tuple(str(name) for name in getattr(self, "feature_names_in_", ()))
        online, learned = self._carried(), None
        if hasattr(self, "weights_"):
            running = None if online is None else online.running
            params = self._checked_params() if running is None else running.published
            learned = self._learned(params)
        return Model(learned, settings, names, online)

    @classmethod
    def _of(cls, model: Model) -> GaussianMixture:
        """The estimator of a model; TypeError or ValueError where its settings are none of ours."""
        estimator = cls(**model.settings)
        if model.learned is not None:
            estimator._learn(model.learned)
        if model.online is not None:
            estimator.n_features_in_ = model.online.kept_rows.shape[1]
            estimator._publish(model.online)
        if model.feature_names:
            estimator.feature_names_in_ = np.asarray(model.feature_names, dtype=object)
        return estimator

    # -- in words --------------------------------------------------------------------------------------------------

    def describe(self) -> Summary:
        """The components in words and numbers: a table when printed, and its numbers as attributes."""
        check_is_fitted(self, "weights_")
        learned = self._learned()
        return Summary(
            learned.params,
            feature_names=tuple(str(name) for name in getattr(self, "feature_names_in_", ())),
            converged=learned.converged,
            n_iter=learned.n_iter,
            n_passes=learned.n_passes,
            lower_bound=learned.lower_bound,
            n_rows=learned.n_rows,
            n_skipped=learned.n_skipped,
            n_steps=self.n_steps_,
        )

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        words = super().__repr__(N_CHAR_MAX)
        if self._online is not None and self._online.running is None:
            return f"{words}\n{self._kept_in_words()}"
        return f"{words}\n{self.describe()}" if hasattr(self, "_fitted_type") else words

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        """What notebooks show: scikit-learn's diagram of the parameters, and below it the components."""
        bundle: dict[str, str] = super()._repr_mimebundle_(**kwargs)
        if "text/html" in bundle and hasattr(self, "_fitted_type"):
            bundle["text/html"] += self.describe()._repr_html_()
        return bundle


def load(path: str | Path) -> Any:
    """The GaussianMixture, or the Statistics, saved at ``path``.

    Raises FileFormatError where the file is damaged, foreign or from a newer version.
    """
    contents = files.read(path, "model", "statistics")
    name = Path(path).name
    if contents.kind == "statistics":
        return Statistics.of(contents, name)
    model = Model.of(contents, name)
    try:
        check_hyper_parameters({**GaussianMixture().get_params(deep=False), **model.settings})
        return GaussianMixture._of(model)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{name} does not describe a mixture ({error}). Take a backup, or fit again.") from error


def _array(X: Any) -> Any:
    try:
        return np.asarray(X)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"The rows given are no array: {error}.") from error


def _what_is_missing(found: Fit) -> str:
    """How far the optimum may be, in words."""
    bounds = found.learned.lower_bounds
    if not isnan(found.gap):
        return f"the likelihood is expected to rise by another {found.gap:.3g} nats a row"
    if len(bounds) < 2:
        return "one pass cannot tell by how much the mean log-likelihood still changes"
    return f"the mean log-likelihood last changed by {bounds[-1] - bounds[-2]:.3g} nats a row"
