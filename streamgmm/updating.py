"""What the estimator learns batch by batch: partial_fit, update, fit_stream; and what sites share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from streamgmm.checks import checked_mixture
from streamgmm.drift import BatchReport, UpdateReport
from streamgmm.errors import DataTypeError, ParameterError, StreamGMMError, shown
from streamgmm.executors import executor_for, single_blas_thread
from streamgmm.files import require_target
from streamgmm.fitting import pass_plan, same_shape, sample_size
from streamgmm.growth import growth
from streamgmm.history import Log
from streamgmm.kernel import m_step
from streamgmm.learned import Learned
from streamgmm.learning import Batch, after_edit, learn_batch, of_mixture, start_rows, statistics_of
from streamgmm.ledger import Unit
from streamgmm.merging import Statistics
from streamgmm.online import Online
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor, Integers, Source
from streamgmm.provenance import provenance
from streamgmm.relearning import learn_growth, takes_back
from streamgmm.settings import Settings
from streamgmm.solvers.stepwise import Running
from streamgmm.sources import as_it_is_now, is_store, open_source, stored
from streamgmm.streams import draw_seed

#: Seconds between two checkpoints.
CHECKPOINT_SECONDS = 60.0


class Updating:
    """Methods of the estimator. What goes from batch to batch is ``_online``; what is published follows from it."""

    report_: BatchReport
    _online: Online | None = None

    def partial_fit(self: Any, X: Any, y: Any = None, *, sample_weight: Any = None) -> Any:
        """Learn one batch of rows in one step of stepwise EM (Cappé & Moulines 2009); any number of rows.

        X, sample_weight: as in ``fit``. The batch is compared with what the model expects before it is learned; the
        report is ``report_``. A model without a mixture keeps the rows until there are ten for every free parameter,
        and finds a start on them. After ``fit`` the statistics of its last pass go on, and count as its rows; a mixture
        that came from elsewhere counts ``prior_rows``.

        Raises what ``fit`` raises for rows that cannot be learned from, and the model is then as it was before.
        """
        with self._unchanged_on_error(), single_blas_thread():
            self._learn_one(X, sample_weight)
        return self

    def update(
        self: Any,
        X: Any,
        *,
        batch_id: str | None = None,
        stop: int | str | None = None,
        flush: bool = False,
        sample_weight: Any = None,
        checkpoint: str | Path | None = None,
    ) -> UpdateReport:
        """Learn what has not been learned yet, each row once, and say what was done.

        A store that grows by whole rows is learned unit by unit, in order, one step each: a unit is a shard, else a
        chunk (``open_source(..., block_rows=)`` sets it). All rows of a store that was fitted count as learned. What
        was learned is part of the model, and is saved with it in one file.

        After ``fit`` with ``solver="incremental"`` the model keeps the statistics of the store's blocks while they
        take at most 64 MiB and nothing else is learned. New units are then added as blocks and no row fades; a block
        that has changed is taken back and learned again, all of it. Where ``forgetting`` or ``average`` is set units
        are learned in steps all the same.

        Parameters
        ----------
        X : str, Path, zarr.Array, zarr.Group or Source
            The store. With ``batch_id`` anything that ``fit`` takes.
        batch_id : str, optional
            The name of the batch X, which is learned in one step unless a batch of that name was learned before.
        stop : int or str, optional
            Rows that are written, or the name of an attribute of the array in which the writer keeps that number.
            Without it only units are learned that are followed by a later chunk in the store.
        flush : bool
            Learn a rest of less than a unit too. Without ``stop`` this says that all rows of the array are written.
        sample_weight : optional
            Weights of the rows of a named batch, as in ``fit``.
        checkpoint : str or Path, optional
            Where to save the model every minute, at the end, and where a later unit raises an error.

        Raises
        ------
        DataError
            Rows that were learned have changed since and cannot be taken back, or rows that are said to be written are
            not there; what ``partial_fit`` raises for rows that cannot be learned from. The units before them stay
            learned.
        ParameterError
            X is neither a store nor a named batch, or an option has no meaning for it.
        FileFormatError
            ``checkpoint`` cannot be written; found out before the first unit is learned.
        """
        settings = Settings.of(self.get_params(deep=False))
        if batch_id is not None and (stop is not None or flush):
            raise ParameterError("stop and flush are for stores that grow, but batch_id names a batch. Drop one.")
        if batch_id is None and sample_weight is not None:
            raise ParameterError("sample_weight goes with a named batch. Give batch_id=NAME, or leave it out.")
        with self._saved_to(checkpoint), single_blas_thread():
            if batch_id is None:
                return self._learn_growth(X, settings, stop, flush, checkpoint)
            with self._unchanged_on_error():
                return self._learn_named(X, batch_id, sample_weight)

    def fit_stream(
        self: Any,
        batches: Iterable[Any],
        *,
        checkpoint: str | Path | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> Any:
        """Learn batch after batch from an iterator, a step each, in the memory of one batch.

        batches: rows, or pairs (rows, weights), as ``partial_fit`` takes them.  checkpoint: a path to which the model
        is saved every minute, at the end, and where the iterator or a batch raises an error.  on_batch: hears the
        report of each batch. ``n_stream_`` counts the batches that were learned, also in a saved model: a stream that
        is given again goes on with ``itertools.islice(batches, model.n_stream_, None)``.

        Raises what ``partial_fit`` raises, naming the batch; those before it stay learned. DataTypeError where
        ``batches`` is one batch or a path, FileFormatError where ``checkpoint`` cannot be written.
        """
        stream, saved = _iterator(batches), time.monotonic()
        with self._saved_to(checkpoint), single_blas_thread():
            for batch in stream:
                pair = isinstance(batch, tuple) and len(batch) == 2
                rows, weights = batch if pair else (batch, None)
                with self._unchanged_on_error(), _numbered(self.n_stream_):
                    self._learn_one(rows, weights, str(self.n_stream_))
                    ledger = self._online.ledger
                    self._online = replace(self._online, ledger=replace(ledger, n_stream=ledger.n_stream + 1))
                if on_batch is not None:
                    on_batch(self.report_)
                if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save(checkpoint)
                    saved = time.monotonic()
        return self

    @property
    def n_stream_(self) -> int:
        """Batches that ``fit_stream`` has learned."""
        return 0 if self._online is None else self._online.ledger.n_stream

    @property
    def n_steps_(self) -> int:
        """Batches and units that were learned in a step since the model was fitted."""
        return 0 if self._online is None else self._online.n_steps

    @property
    def effective_rows_(self) -> float:
        """Rows of equal weight that would tell as much as the model remembers (Kish 1965); 0 before the start."""
        running = None if self._online is None else self._online.running
        return 0.0 if running is None else running.effective_rows

    def _kept_in_words(self: Any) -> str:
        """What a model without a mixture yet has."""
        kept = len(self._online.kept_rows)
        try:
            settings = Settings.of(self.get_params(deep=False))
        except ParameterError:  # they may be set to anything, and shown
            return f"no mixture yet: {kept:,} rows are kept for a start"
        needed = start_rows(settings, self.n_features_in_)
        if kept >= needed:
            return f"no mixture yet: {kept:,} rows are kept, but fewer than {settings.n_components} distinct ones"
        return f"no mixture yet: {kept:,} of {needed:,} rows are kept for a start"

    # -- what sites share ------------------------------------------------------------------------------------------

    def statistics(self: Any, X: Any, *, sample_weight: Any = None) -> Statistics:
        """The statistics of rows X at the present parameters: they add, can be saved, and hold no row.

        X, sample_weight, errors: as in ``score``.
        """
        params = self._params()
        source = self._open(X, sample_weight)
        with single_blas_thread(), self._executor(source, params) as (executor, source):
            return Statistics(statistics_of(source, executor, params), params)

    @classmethod
    def from_statistics(cls: Any, statistics: Statistics, **parameters: Any) -> Any:
        """A model from statistics: one step of EM from the parameters that they were taken at.

        parameters: hyper-parameters of the model, such as ``reg_covar``. Raises NumericalError where a covariance
        degenerates, DataTypeError where ``statistics`` are something else.
        """
        if not isinstance(statistics, Statistics):
            raise DataTypeError(
                f"A model is made from Statistics, but a {type(statistics).__name__} was given. Take them with "
                "model.statistics(X), or read them with streamgmm.load(PATH)."
            )
        params = statistics.params
        model = cls(params.n_components, covariance_type=params.covariance.kind, **parameters)
        settings = Settings.of(model.get_params(deep=False))
        found, _ = m_step(statistics.stats, params, settings.reg_covar)
        found.covariance.root(*found.means.shape)
        stats = statistics.stats
        learned = Learned(found, n_rows=stats.n_rows, n_skipped=stats.n_skipped, provenance=provenance())
        model._learn(replace(learned, lower_bounds=(statistics.log_likelihood,), n_iter=1))
        model._online = Online.started(Running.of_rows(stats, found), stats.n_rows, stats.n_skipped)
        return model

    # -- who is who ------------------------------------------------------------------------------------------------

    def match(self: Any, other: Any) -> Integers:
        """(k,) for each component here, the number of the one of ``other`` that it is, each of them taken once.

        The pairs with the smallest sum of divergences (Jeffreys 1946) are found exactly (Kuhn 1955). Updates never
        change the order of components; another fit may, and ``reordered`` gives it back:
        ``new.reordered(old.match(new))``.
        """
        if not isinstance(other, Updating):
            raise DataTypeError(
                f"Components are matched with those of a GaussianMixture, but a {type(other).__name__} was given. "
                "GaussianMixture.from_sklearn and from_parameters make one."
            )
        ours, theirs = self._params(), other._params()  # type: ignore[attr-defined]
        if ours.means.shape != theirs.means.shape:
            raise ParameterError(
                f"Components of means {ours.means.shape} and {theirs.means.shape} cannot be matched one to one. Give "
                "models with as many components and features."
            )
        return np.asarray(linear_sum_assignment(_divergences(ours, theirs))[1])

    def reordered(self: Any, order: Any) -> Any:
        """The same model with its components in another order: ``order`` (k,) are the numbers they have now."""
        params = self._params()
        try:
            numbers = np.asarray(order)
        except (TypeError, ValueError):  # rows of different lengths
            numbers = np.empty(0)
        whole = numbers.dtype.kind in "iu" and numbers.shape == params.weights.shape
        if not whole or sorted(numbers.tolist()) != list(range(len(numbers))):
            raise ParameterError(
                f"order must be the whole numbers 0 to {params.n_components - 1}, each once, but it is {shown(order)}."
            )
        model = type(self)._of(self._model())
        online = model._online
        model._learn(replace(model._learned(), params=model._params().reordered(numbers)))
        if online is not None:
            model._online = online.reordered(numbers)
        return model

    # -- how -------------------------------------------------------------------------------------------------------

    def _learn_one(self: Any, X: Any, sample_weight: Any, name: str | None = None) -> None:
        """Learn X in one step, and publish."""
        settings = Settings.of(self.get_params(deep=False))
        source = self._open(X, sample_weight, reset=not hasattr(self, "n_features_in_"), least_rows=1)
        online, log = self._before(source, settings), self._log()
        with self._executor(source, settings) as (executor, counted):
            seed = draw_seed(self.random_state)
            online, report = learn_batch(online, Batch.of(counted), executor, settings, seed, log, name)
        self._publish(online)
        self.report_ = report
        log.say(str(report))

    def _learn_named(self: Any, X: Any, batch_id: Any, sample_weight: Any) -> UpdateReport:
        if not isinstance(batch_id, str) or not batch_id:
            raise ParameterError(f"batch_id must be a name that is not empty, but it is {shown(batch_id)}.")
        known = {} if self._online is None else self._online.ledger.batches
        if batch_id in known:
            report = BatchReport(batch_id, learned=False)
            self._log().say(str(report))
            return UpdateReport(batch_id, batches=(replace(report, remark="already learned, nothing done"),))
        self._learn_one(X, sample_weight, batch_id)
        ledger = self._online.ledger.with_batch(batch_id, self.report_.n_rows)
        self._online = replace(self._online, ledger=ledger)
        return UpdateReport(batch_id).with_batch(self.report_)

    def _learn_growth(self: Any, X: Any, settings: Settings, stop: Any, flush: bool, checkpoint: Any) -> UpdateReport:
        """Learn the new units of a store. What was learned stays where a later unit raises an error."""
        source = self._growing(X)
        log, saved = self._log(), time.monotonic()
        online = self._before(source, settings)
        with self._executor(source, settings) as (executor, _):
            back = takes_back(online, settings)
            ledger, found = growth(online.ledger, source, executor, stop, flush=flush, say=log.say, takes_back=back)
            online, record = replace(online, ledger=ledger), found.record
            done = (online, 0)
            units: list[Unit] = []
            report = UpdateReport(source.name, waiting=found.waiting, why=found.why)
            seed = draw_seed(self.random_state)

            def publish() -> None:
                after, count = done
                with self._unchanged_on_error():
                    self._publish(replace(after, ledger=ledger.with_store(record.extended(units[:count]))))

            try:
                for after, learned, batch in learn_growth(online, found, source, executor, settings, seed, log):
                    units += learned
                    done = after, len(units)  # at once: an interrupt finds both the step and its unit, or neither
                    report = report.with_batch(batch)
                    self.report_ = batch
                    log.say(str(batch))
                    if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                        publish()
                        self.save(checkpoint)
                        saved = time.monotonic()
            except BaseException:
                if units:
                    publish()
                raise
            publish()
        log.say(str(report))
        return report

    def _growing(self: Any, X: Any) -> Any:
        """The zarr source of X, with as many features as the model has. ParameterError where X is none."""
        lies_in_store = is_store(X) and not hasattr(X, "__dask_graph__")
        opened = None
        if lies_in_store:
            opened = stored(open_source(as_it_is_now(X), missing_chunks="wait") if is_closed(X) else X)
        if opened is None:
            raise ParameterError(
                f"Which rows of a {type(X).__name__} were learned before cannot be known. Give the zarr store, or the "
                "name of the batch with batch_id=NAME; partial_fit learns any rows without looking back."
            )
        if hasattr(self, "n_features_in_"):
            self._require_features(opened, reset=False)
        return opened

    def _before(self: Any, source: Source, settings: Settings) -> Online:
        """What goes into the next batch; ParameterError where the parameters no longer describe the model."""
        d, carried = source.n_features, self._carried()
        if carried is not None and carried.running is not None:
            same_shape(carried.running.published, settings, d, "Learning")
        elif hasattr(self, "weights_"):
            last = same_shape(self._checked_params(), settings, d, "Learning")
            return Online.started(of_mixture(last, settings), int(self.n_rows_), int(self.n_skipped_))
        return carried or Online.nothing(d)

    def _carried(self: Any) -> Online | None:
        """What goes from batch to batch; where the mixture was set by hand since, that as pseudo-data.

        Raises ParameterError where it was set to what is no mixture.
        """
        online = self._online
        if online is None or online.running is None:
            return online
        known, said = online.running.published, (self.weights_, self.means_, self.covariances_)
        if all(map(np.array_equal, said, (known.weights, known.means, known.covariance.values))):
            return online
        edited = after_edit(online, self._checked_params())
        self._log().say("the mixture was set by hand: it goes on as pseudo-data of as many rows as were remembered")
        return edited

    def _checked_params(self: Any) -> MixtureParams:
        """The published mixture, which may have been set by hand; ParameterError where it is none any more."""
        return checked_mixture(self.weights_, self.means_, self.covariances_, self._fitted_type)

    @contextmanager
    def _executor(self: Any, source: Source, of: Settings | MixtureParams) -> Iterator[tuple[Executor, Source]]:
        """What runs the blocks of a source, with tasks of the right size, and the source with its rows counted."""
        with executor_for(source) as executor:
            executor.everywhere(source.checks)
            counted = source.counted(executor)
            if isinstance(of, Settings):
                k, structure, sample = of.n_components, of.structure, 0
                if self._online is None or self._online.running is None:
                    sample = max(sample_size(counted, of), start_rows(of, source.n_features))
            else:
                k, structure, sample = of.n_components, type(of.covariance), 0
            known = None if self._online is None else self._online.remembered
            kept = 0 if known is None else known.n_bytes
            plan = pass_plan(counted, executor, k, structure, sample=min(sample, counted.n_rows), kept=kept)
            yield executor.sized(plan.blocks_per_task), counted

    def _log(self: Any) -> Log:
        return Log(int(self.verbose))

    def _publish(self: Any, online: Online) -> None:
        """Make attributes of what was learned."""
        self._online = online
        if online.running is not None:
            params, counts = online.running.published, {"n_rows": online.n_rows, "n_skipped": online.n_skipped}
            known = hasattr(self, "weights_")
            base = self._learned() if known else Learned(params, provenance=provenance())
            self._learn(replace(base, params=params, **counts))
            self._online = online
        else:
            self.n_features_in_ = online.kept_rows.shape[1]
            self.n_rows_, self.n_skipped_ = online.n_rows, online.n_skipped

    @contextmanager
    def _saved_to(self: Any, checkpoint: Any) -> Iterator[None]:
        """What is learned inside is saved at the end, and where an error is raised, which stays the error."""
        if checkpoint is not None:
            require_target(checkpoint)
        before = self._online
        try:
            yield
        except BaseException as error:
            if checkpoint is not None and self._online is not before:
                try:
                    self.save(checkpoint)
                except StreamGMMError as another:
                    error.add_note(f"What was learned before could not be saved: {another}")
            raise
        if checkpoint is not None and self._online is not None:
            self.save(checkpoint)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Where an error is raised, all attributes are as they were."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise


def is_closed(X: Any) -> bool:
    """Whether ``X``, which lies in a store, is still to be opened: it is no source."""
    return not hasattr(X, "counted")


@contextmanager
def _numbered(number: int) -> Iterator[None]:
    """Errors that are raised on purpose name the batch of the stream that they are in."""
    try:
        yield
    except StreamGMMError as error:
        raise type(error)(f"Batch {number} of the stream: {error}") from error


def _iterator(batches: Any) -> Iterator[Any]:
    """The batches one by one; DataTypeError where what was given is a single batch, or nothing of the kind."""
    one = isinstance(batches, (str, bytes, Path, Mapping)) or hasattr(batches, "shape") or hasattr(batches, "blocks")
    if one or not isinstance(batches, Iterable):
        raise DataTypeError(
            f"batches must be an iterator or a list of batches, but a {type(batches).__name__} was given. Give [X] for "
            "a single one, or use partial_fit(X); update(PATH) learns a store chunk by chunk."
        )
    return iter(batches)


def _divergences(ours: MixtureParams, theirs: MixtureParams) -> Any:
    """(k, k) Jeffreys divergences between Gaussians: KL of the one from the other plus KL of the other from the one."""
    k, d = ours.means.shape
    scale = ours.frame().scale
    dense = [(p.means * scale, p.covariance.scaled(scale).dense(k, d)) for p in (ours, theirs)]
    inverse = [np.linalg.inv(covariances) for _, covariances in dense]
    way = dense[0][0][:, None] - dense[1][0][None]
    traces = np.einsum("aij,bji->ab", inverse[0], dense[1][1]) + np.einsum("bij,aji->ab", inverse[1], dense[0][1])
    lengths = np.einsum("abi,aij,abj->ab", way, inverse[0], way) + np.einsum("abi,bij,abj->ab", way, inverse[1], way)
    return 0.5 * (traces + lengths) - d
