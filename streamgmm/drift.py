"""Does a batch look like what the mixture expects? A report for each batch, and a chart that raises an alarm.

At a fixed point of EM the moments of new rows under the mixture's own responsibilities are, on average, those of the
mixture: a share w_k of the rows, and a mean of zero in the component's own standard coordinates. How far a batch is
from that, its innovation, has a covariance of at most I / n for n independent rows, whatever their distribution,
because a responsibility is at most one. So a chart of innovations needs no assumption on the shape of clusters. It is
an exponentially weighted moving average (Lowry, Woodall, Champ & Rigdon 1992), which adds up what batch after batch
says; beside it runs the same for the log-likelihood of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any

import numpy as np
from scipy.special import chdtri

from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats
from streamgmm.solvers.stepwise import LEAST_WEIGHT, Running
from streamgmm.stats import SufficientStats

#: The share that a batch has of the moving average.
SMOOTHING = 0.3

#: How often a batch without drift may raise an alarm, at most.
FALSE_ALARMS = 1e-5

#: Reports that an update keeps.
MOST_REPORTS = 100

#: More than this is as far, so that its square is a number.
MOST_DEVIATIONS = 1e140

#: Variances of a log density below this are rounding.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Chart:
    """Moving averages over the batches so far.

    innovation: (k, 1 + d), shares and means in standard coordinates.  surplus: log-likelihood a row beyond the expected
    one, in its standard deviations.  noise: what the variance of each is, in units of one row.
    """

    innovation: Floats
    surplus: float = 0.0
    noise: float = 0.0

    @classmethod
    def blank(cls, params: MixtureParams) -> Chart:
        k, d = params.means.shape
        return cls(np.zeros((k, 1 + d)))


@dataclass(frozen=True)
class BatchReport:
    """What a batch was like, and what it changed. Log-likelihoods are nats a row.

    name: of the batch, where it has one.  n_rows, n_skipped: rows learned from, rows left out.  log_likelihood: of the
    batch before it was learned.  expected, standard_error: what the model expected of it.  alarm_statistic: the chart
    of drift; above one is an alarm.  component: the one that the chart blames, None where it is the log-likelihood.
    step: the share that the batch has of the statistics now.  weights_moved: the largest change of a weight.
    means_moved: that of a mean, in standard deviations of its component.  effective_rows: rows of equal weight that the
    model remembers as much as.  learned: False where the batch had been learned before, and nothing was done.
    again: True where rows that were learned before were taken back, and these learned in their place.
    started: False while rows are kept until there are enough for a start.  remark: what else is to be said.
    """

    name: str | None = None
    n_rows: int = 0
    n_skipped: int = 0
    log_likelihood: float | None = None
    expected: float | None = None
    standard_error: float | None = None
    alarm_statistic: float = 0.0
    component: int | None = None
    step: float = 0.0
    weights_moved: float = 0.0
    means_moved: float = 0.0
    effective_rows: float = 0.0
    learned: bool = True
    again: bool = False
    started: bool = True
    remark: str = ""

    @property
    def alarm(self) -> bool:
        """Whether the batch, with those before it, is not what the model expects."""
        return self.alarm_statistic > 1.0

    def __str__(self) -> str:
        name = "batch" if self.name is None else f"batch {self.name}"
        if not self.learned:
            return f"{name}: already learned, nothing done"
        if self.n_skipped and not self.n_rows:
            return f"{name}: all of its {self.n_skipped:,} rows are left out"
        counts = f"{name}: {self.n_rows:,} rows" + f" ({self.n_skipped:,} left out)" * bool(self.n_skipped)
        if not self.started:
            return f"{counts}, {self.remark}"
        fit = "" if self.log_likelihood is None else f", log-likelihood/row {self.log_likelihood:.4f}"
        if fit and self.expected is not None:
            fit += f" (expected {self.expected:.4f} ± {self.standard_error:.4f})"
        alarm = (
            ""
            if not self.alarm
            else "  DRIFT: "
            + ("the log-likelihood" if self.component is None else f"component {self.component}")
            + f" at {self.alarm_statistic:.1f} times the limit"
        )
        return (
            f"{counts}{fit}, step {self.step:.3g}, weights moved by {self.weights_moved:.2%} at most, means by "
            f"{self.means_moved:.3g} deviations, memory {self.effective_rows:,.0f} rows{alarm}"
            + f"  {self.remark}"
            * bool(self.remark)
        )


@dataclass(frozen=True)
class UpdateReport:
    """What an update did.

    n_units: steps that were taken.  n_rows, n_skipped: new rows learned from and left out in them.  n_again: rows of
    blocks that had changed, which were taken back and learned again.  waiting: rows that are
    there and were not learned yet, and ``why``.  alarms: units with an alarm.  batches: reports of the last units.
    """

    name: str
    n_units: int = 0
    n_rows: int = 0
    n_skipped: int = 0
    waiting: int = 0
    why: str = ""
    alarms: int = 0
    n_again: int = 0
    batches: tuple[BatchReport, ...] = ()

    def with_batch(self, report: BatchReport) -> UpdateReport:
        return replace(
            self,
            n_units=self.n_units + 1,
            n_rows=self.n_rows + report.n_rows * (not report.again),
            n_skipped=self.n_skipped + report.n_skipped * (not report.again),
            n_again=self.n_again + report.n_rows * report.again,
            alarms=self.alarms + report.alarm,
            batches=(*self.batches, report)[-MOST_REPORTS:],
        )

    @property
    def alarm(self) -> bool:
        """Whether any unit was not what the model expected."""
        return self.alarms > 0

    def __str__(self) -> str:
        waits = f" {self.waiting:,} rows wait: {self.why}." if self.waiting else ""
        if not self.n_units:
            return f"{self.name}: {self.batches[-1].remark if self.batches else 'nothing new'}." + waits
        alarms = f", {self.alarms:,} of them with an alarm of drift" if self.alarms else ""
        units = f"{self.n_units:,} step{'s' * (self.n_units != 1)}"
        again = f" and {self.n_again:,} learned again" * bool(self.n_again)
        new = f"{self.n_rows:,} new rows learned{again}"
        return f"{self.name}: {new} in {units}{alarms}.{waits} Last: {self.batches[-1]}."


def observed(chart: Chart, running: Running, batch: SufficientStats) -> tuple[Chart, BatchReport]:
    """The chart and a report after a batch whose statistics were taken at ``running.params``, before it is learned."""
    stats, weight = running.stats, max(batch.weight, LEAST_WEIGHT)
    mean = batch.log_likelihood / batch.weight
    own = 1.0 / running.effective_rows  # the model's own error, which batches do not average away
    with np.errstate(over="ignore"):  # what is beyond all limits is an alarm, however far
        expected = np.float64(stats.log_likelihood)
        variance = np.nan_to_num(stats.log_likelihood_squares - expected**2)
        deviation = float(np.sqrt(max(variance, LEAST_VARIANCE)))
        surplus = (mean - stats.log_likelihood) / deviation
        keep = 1.0 - SMOOTHING if chart.noise else 0.0
        chart = Chart(
            _finite(keep * chart.innovation + (1.0 - keep) * innovation(batch, running.params)),
            float(_finite(keep * chart.surplus + (1.0 - keep) * surplus)),
            keep**2 * chart.noise + (1.0 - keep) ** 2 / weight,
        )
        k, freedom = chart.innovation.shape
        variance = np.float64(chart.noise + own)
        statistics = (chart.innovation**2).sum(axis=1) / (variance * _limit(freedom, k + 1))
        blamed = int(np.argmax(statistics))
        likelihood = float(chart.surplus**2 / (variance * _limit(1, k + 1)))
        largest = max(float(statistics[blamed]), likelihood)
    return chart, BatchReport(
        n_rows=batch.n_rows,
        n_skipped=batch.n_skipped,
        log_likelihood=mean,
        expected=stats.log_likelihood,
        standard_error=deviation * sqrt(1.0 / weight + own),
        alarm_statistic=largest,
        component=None if likelihood == largest else blamed,
    )


def _finite(values: Any) -> Any:
    """Numbers that float64 can square and a file can hold."""
    return np.clip(np.nan_to_num(values), -MOST_DEVIATIONS, MOST_DEVIATIONS)


def innovation(batch: SufficientStats, params: MixtureParams) -> Floats:
    """(k, 1 + d): shares and means of a batch less those of the mixture, each with variance at most 1 / rows."""
    k, d = params.means.shape
    scale = batch.scale
    root = params.covariance.scaled(scale).root(k, d)
    centred = batch.about(params.means, scale)
    weights, one = params.weights, 1.0 / max(batch.weight, LEAST_WEIGHT)
    spread = np.sqrt(np.maximum(weights * (1.0 - weights), one**2))
    share = (centred.mass / batch.weight - weights) / spread
    first = centred.first / (batch.weight * np.sqrt(np.maximum(weights, one))[:, None])
    whitened = np.stack([root.whiten(j, first[j][:, None])[:, 0] for j in range(k)])
    return np.concatenate([share[:, None], whitened], axis=1)


def moved(before: MixtureParams, after: MixtureParams) -> tuple[float, float]:
    """The largest change of a weight, and of a mean in the standard deviations that its component had."""
    k, d = before.means.shape
    scale = before.frame().scale
    root = before.covariance.scaled(scale).root(k, d)
    way = (after.means - before.means) * scale
    lengths = [float(np.linalg.norm(root.whiten(j, way[j][:, None]))) for j in range(k)]
    return float(np.abs(after.weights - before.weights).max()), max(lengths, default=inf)


def _limit(freedom: int, tests: int) -> float:
    """What a chi-square variable exceeds with probability FALSE_ALARMS, shared by so many tests."""
    return float(chdtri(freedom, FALSE_ALARMS / tests))
