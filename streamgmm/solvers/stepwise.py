"""Stepwise EM (Sato & Ishii 2000; Cappé & Moulines 2009; Liang & Klein 2009): every batch moves running statistics.

With s the statistics per row, S / n those of a batch at the present parameters, and a step g that falls with time,

    s <- (1 - g) s + g S / n,    parameters <- M(s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import expm1, inf, log, log1p

import numpy as np

from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Integers
from streamgmm.stats import SufficientStats

#: Rows that count less than this in all count as this much.
LEAST_WEIGHT = 1e-100


@dataclass(frozen=True)
class Schedule:
    """How long rows are remembered, by a clock that counts rows (weights count as rows).

    memory(clock) = clock                                       up to ``reference`` rows: all rows count alike
                    reference * (clock / reference)^exponent    beyond: old rows fade, for they were learned from with
                                                                poorer parameters (Cappé & Moulines 2009, sec. 3)

    and a batch of n rows keeps exp(-integral of 1 / memory over n rows) of the statistics before it. The step is
    therefore the same in all however the rows are divided. reference: rows.  exponent: in (0.5, 1]; 1 counts all rows
    alike for ever.  rate: the least share that every row forgets, in [0, 1]; with 1 only the last batch counts.
    """

    reference: float
    exponent: float
    rate: float = 0.0

    @property
    def longest(self) -> float:
        """The memory that ``rate`` allows, in rows."""
        return _inverse(-log1p(-self.rate)) if self.rate < 1.0 else 0.0

    def memory(self, clock: float) -> float:
        """Rows that are remembered when the clock stands there."""
        past = clock / self.reference
        return min(clock if past <= 1.0 else self.reference * past**self.exponent, self.longest)

    def clock(self, memory: float) -> float:
        """Where the clock stands when so many rows are remembered."""
        past = memory / self.reference
        return memory if past <= 1.0 else self.reference * past ** (1.0 / self.exponent)

    def step(self, memory: float, weight: float) -> float:
        """The share that a batch of this weight takes of the statistics."""
        clock = self.clock(memory)
        if clock <= 0.0 or self.rate >= 1.0:
            return 1.0
        end, turn = clock + weight, self.clock(self.longest)  # from there on, ``rate`` forgets more
        faded = _faded(clock, min(end, turn), self.reference, self.exponent) if clock < turn else 0.0
        return -expm1(-faded - max(0.0, end - max(clock, turn)) * _inverse(self.longest))

    def after(self, memory: float, weight: float) -> float:
        """Rows that are remembered after a batch of this weight."""
        return self.memory(self.clock(memory) + weight)


def _inverse(value: float) -> float:
    return 1.0 / value if value > 0.0 else inf


def _faded(start: float, end: float, reference: float, exponent: float) -> float:
    """The integral of 1 / memory from one reading of the clock to another."""
    below = log(min(end, reference) / start) if start < reference else 0.0
    if end <= reference:
        return below
    begin = max(start, reference)
    grown, rest = log1p((end - begin) / begin), 1.0 - exponent
    beyond = grown if rest == 0.0 else (begin / reference) ** rest * expm1(rest * grown) / rest
    return below + beyond


@dataclass(frozen=True, eq=False)
class Average:
    """Running statistics averaged on the way, the later the heavier (Polyak & Juditsky 1992; Shamir & Zhang 2013).

    A read-out, never fed back. Statistics are averaged rather than parameters, so that covariances stay positive
    definite.  rows: those that it spans, by weight.
    """

    stats: SufficientStats
    params: MixtureParams
    rows: float = 0.0

    def with_next(self, running: Running, weight: float, reg_covar: float) -> Average:
        """With the statistics after one more batch; those after row r weigh in proportion to r."""
        rows = self.rows + weight
        stats = self.stats.blended(running.stats, 1.0 - (self.rows / rows) ** 2)
        params, _ = m_step(stats, running.params, reg_covar, running.least_rows * running.squares)
        params.covariance.root(*params.means.shape)
        return Average(stats, params, rows)


def _expected_of_others(stats: SufficientStats, params: MixtureParams) -> tuple[float, float]:
    """What the log density of further rows, and its square, are on average, from those of the rows that made params."""
    one = stats.per_weight()
    # these rows made the parameters: new ones are less likely by P / n on average (Akaike 1974)
    lead = params.n_parameters / max(stats.weight, params.n_parameters)
    mean = one.log_likelihood - lead
    return mean, one.log_likelihood_squares - (2.0 * mean + lead) * lead


@dataclass(frozen=True, eq=False)
class Running:
    """What stepwise EM carries from batch to batch.

    stats: per row, weight one.  params: those that the next batch is learned with.  memory: rows that are remembered,
    by the schedule.  squares: sum of the squared weights that rows have in ``stats``.  average: where one is kept.
    """

    stats: SufficientStats
    params: MixtureParams
    memory: float
    squares: float
    average: Average | None = None

    @property
    def published(self) -> MixtureParams:
        """The parameters to be used: those of the average, where one is kept."""
        return self.params if self.average is None else self.average.params

    @property
    def effective_rows(self) -> float:
        """Rows of equal weight that would tell as much: 1 / sum of squared weights (Kish 1965)."""
        return 1.0 / self.squares

    @property
    def least_rows(self) -> int:
        """Rows that a component must remember for its mean and covariance to follow them."""
        return self.params.n_features + 2

    @classmethod
    def of_rows(cls, stats: SufficientStats, params: MixtureParams) -> Running:
        """After rows have left ``stats`` at parameters near ``params``, which follow from them."""
        one = stats.per_weight()
        mean, squares = _expected_of_others(stats, params)
        one = replace(one.about(one.means(), one.scale), log_likelihood=mean, log_likelihood_squares=squares)
        return cls(one, params, stats.weight, 1.0 / max(stats.weight, LEAST_WEIGHT))

    @classmethod
    def of_fit(cls, params: MixtureParams, stats: SufficientStats) -> Running:
        """After rows have led to ``params``, which do not follow from the ``stats`` they left at others nearby.

        The statistics from which they would follow take their place: a mixture has no others.
        """
        return cls.of_mixture(params, max(stats.weight, LEAST_WEIGHT), _expected_of_others(stats, params))

    @classmethod
    def of_mixture(cls, params: MixtureParams, rows: float, log_densities: tuple[float, float]) -> Running:
        """As if ``rows`` rows had been drawn from a mixture: its statistics as pseudo-data.

        log_densities: what the log density of such a row and its square are on average.
        """
        k, d = params.means.shape
        scale = params.frame().scale
        covariance = params.covariance.scaled(scale)
        second, common = covariance.second_moments(k, d)
        mass = params.weights[:, None]
        moments = np.concatenate([mass, np.zeros((k, d)), mass * second], axis=1)
        stats = SufficientStats(
            covariance.quadratic, moments, common, params.means, scale, *log_densities, weight=1.0, n_rows=0
        )
        return cls(stats, params, rows, 1.0 / rows)

    def reordered(self, order: Integers) -> Running:
        """Components ``order``, the numbers they have now."""
        average = self.average
        if average is not None:
            average = replace(average, stats=average.stats.reordered(order), params=average.params.reordered(order))
        return replace(self, stats=self.stats.reordered(order), params=self.params.reordered(order), average=average)

    def learned(self, batch: SufficientStats, schedule: Schedule, reg_covar: float, *, averages: bool) -> Running:
        """After one more batch, whose statistics were taken at ``params``. averages: whether to keep an average.

        A component that remembers fewer than d + 2 rows keeps its mean and covariance. Raises NumericalError where a
        covariance degenerates.
        """
        step = schedule.step(self.memory, batch.weight)
        stats = self.stats.blended(batch.per_weight(), step)
        squares = (1.0 - step) ** 2 * self.squares + step**2 / max(batch.weight, LEAST_WEIGHT)
        params, _ = m_step(stats, self.params, reg_covar, self.least_rows * squares)
        params.covariance.root(*params.means.shape)
        after = Running(stats, params, schedule.after(self.memory, batch.weight), squares)
        if not averages:
            return after
        average = self.average or Average(self.stats, self.params)
        return replace(after, average=average.with_next(after, batch.weight, reg_covar))
