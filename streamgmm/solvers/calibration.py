"""A surrogate of the likelihood for mixtures of few parameters: the sample, weighted so that it tells what all rows do.

Every read of all rows gives the means, over all of them, of functions that the sample knows row by row: the statistics
r_k(x) (1, z, Q(z)) at the parameters of that read, and log p(x) there. The sample's rows get the weights w, nearest to
one, with which their means of these are exactly those of all rows (calibration, the linear case of Deville & Särndal
1992, by principal components of these controls). With D = log p_u - log p_theta of each row,

    L(u) - L(theta)  is estimated by  mean(w D),    with error^2 = (1 - m / n) mean(e^2) / (m - q - 1),

for mean(w D) is the regression estimate: e is what is left of D after regression on the q controls, by 1 - h, h the
leverage of the row, for a row that alone decides a control fits it too well (HC3: MacKinnon & White 1985). EM on the
weighted sample would raise the estimate, and overstate it where it fits the sample's own rows. What is raised is its
lower confidence bound, estimate - z error; that is, up to a constant, mean(omega D) with

    omega = w - z sqrt((1 - m / n) / (m - q - 1)) R(e / (1 - h)) / sqrt(mean(e^2)),

R the regression's remainder: rows that speak for u count less and those against it more (that is the worst case over
weights nearby: Duchi & Namkoong 2019). Steps are those of EM with these weights, accelerated as in ``anderson``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import regularisation, regularised_gain
from streamgmm.params import MixtureParams
from streamgmm.protocols import Booleans, Floats, Integers
from streamgmm.quadratic import OUTER
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import QUIET, Accelerated
from streamgmm.solvers.gain import Gain, Point, Walk, exact_gain
from streamgmm.stats import SufficientStats

#: Rows of the sample for each control, and numbers that all controls have at most.
ROWS_EACH = 50
MOST_NUMBERS = 2**25
#: Rows at a time where a copy of all controls would be too much.
PART_ROWS = 4096
#: Rows of the sample for each number in a component's statistics: with fewer it is not followed.
FOLLOWED_ROWS = 2.0
#: The variance of a control below which it tells the same as others.
COLLINEAR = 1e-6
#: Weights below this are avoided: a mixture could gain without limit by its bad fit to rows that count against it.
LEAST_WEIGHT = -0.5
#: Rows of less leverage than this count as if they had none.
LEVERAGE = 0.1
#: The least 1 - h, of rows that alone decide a control.
LEAST_INDEPENDENCE = 0.1
#: The walk has arrived where two steps in a row raise the bound by less than this part of it.
ARRIVED = 1e-6
#: Steps in a row that do not raise the bound after which a walk is given up: weights below zero can send it in circles.
PATIENCE = 32


def most_reads(n_rows: int, size: float, n_parameters: int) -> int:
    """Reads that a sample of so many rows can be calibrated to; 0 where there are too many parameters for one.

    size: rows of equal weight that would tell as much.
    """
    most_controls = min(size / ROWS_EACH, MOST_NUMBERS / n_rows)
    return int(most_controls / (n_parameters + 1))


def calibration_bytes(n_rows: int, n_parameters: int) -> int:
    """What a calibrated sample of so many rows takes at most, beside the rows: its controls, and a copy of them."""
    return 2 * 8 * n_rows * (n_parameters + 1) * most_reads(n_rows, n_rows, n_parameters)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The sample as it tells the likelihood around a point.

    few: (k,) components with too few rows of the sample to be followed: they take EM's own step and no other.
    scaled: (d, m) the rows in the units of the point's statistics.  densities: (m,) log p at the point.  shares: (m,)
    of the rows, sum one.  weighted: (m,) the same times their calibrated weights.  controls: (q, m) uncorrelated, of
    mean zero and variance one.  independence: (m,) one less each row's leverage on them.  taken: what ``reg_covar``
    takes at the point.  caution: standard errors that a bound lies below.  misfit: how far the sample's means are from
    those of all rows, in variance; one by chance.
    """

    point: Point
    sample: Sample
    few: Booleans
    scaled: Floats
    densities: Floats
    shares: Floats
    weighted: Floats
    controls: Floats
    independence: Floats
    taken: Floats
    reg_covar: float
    caution: float
    misfit: float

    @classmethod
    def at(
        cls, point: Point, sample: Sample, caution: float, others: Sequence[Point] = (), reg_covar: float = 0.0
    ) -> Calibrated:
        """others: further points that were read."""
        weights = sample.row_weights
        shares = weights / weights.sum()
        few = of_few_rows(point.stats, sample.size)
        densities, responsibilities = sample.scored(point.params)
        truth = [_flat(point.stats, few)]
        each = len(truth[0])
        columns = np.empty((each + len(others) * (each + 1), len(sample)))
        _row_statistics(point, sample, responsibilities, few, columns[:each])
        for other, rest in zip(others, np.split(columns[each:], len(others)) if others else (), strict=True):
            log_density, responsibilities = sample.scored(other.params)
            _row_statistics(other, sample, responsibilities, few, rest[:each])
            rest[each] = log_density - densities
            truth += [_flat(other.stats, few), np.array([other.log_likelihood - point.log_likelihood])]
        controls, target, missed = _uncorrelated(columns, np.concatenate(truth), shares)
        apart = max(float(target @ target) / max(len(target), 1), missed)
        misfit = apart * sample.size / sample.left_out if sample.left_out else 0.0
        weights, controls = _calibrated(controls, target)
        leverage = shares * np.einsum("qm,qm->m", controls, controls)
        independence = np.where(leverage > LEVERAGE, np.maximum(1.0 - leverage, LEAST_INDEPENDENCE), 1.0)
        return cls(
            point,
            sample,
            few,
            _scaled(point, sample),
            densities,
            shares,
            shares * weights,
            controls,
            independence,
            regularisation(point.params, reg_covar),
            reg_covar,
            caution,
            misfit,
        )

    def told(self, params: MixtureParams, step: int) -> tuple[Gain, SufficientStats]:
        """What ``params`` gain, and the statistics per row of the weighted sample there, whose log-likelihood is the
        bound of all rows'. NumericalError where a component has no rows with these weights.
        """
        log_density, responsibilities = self.sample.scored(params)
        rise = log_density - self.densities
        free = max(self.sample.size - len(self.controls) - 1.0, 1.0)
        spread = sqrt(self.sample.left_out / free * max(self.misfit, 1.0))
        rest = rise - self.shares @ rise
        rest -= self._explained(rest)
        deviation = sqrt(self.shares @ (rest / self.independence) ** 2)
        lean = self.caution * spread / deviation if deviation > 0.0 else 0.0
        weights = self.weighted - lean * self.shares * self._against(rest)
        mass = np.where(self.few, self.point.stats.mass, responsibilities @ weights)
        if not (mass > 0.0)[~self.few].all():
            raise NumericalError("A component has no rows of the weighted sample.")
        estimate, error = float(self.weighted @ rise), spread * deviation
        bound = self.point.log_likelihood + estimate - self.caution * error
        stats = _statistics(self.point.stats, self.scaled, responsibilities, weights)
        stats.moments[self.few] = self.point.stats.moments[self.few]
        return self._gain(params, mass, estimate, error, step), replace(stats, log_likelihood=bound)

    def _explained(self, values: Floats, rows: slice | Integers = slice(None)) -> Floats:
        """(m,) regression on the controls of values (m,) of mean zero, or of any that are zero but in ``rows``."""
        return np.asarray((self.controls[:, rows] @ (self.shares * values)[rows]) @ self.controls)

    def _against(self, rest: Floats) -> Floats:
        """(m,) R(e / (1 - h)), where e / (1 - h) is not e in few rows."""
        rows = np.flatnonzero(self.independence < 1.0)
        more = np.zeros_like(rest)
        more[rows] = rest[rows] * (self.independence[rows] ** -2.0 - 1.0)
        return np.asarray(rest + more - self.shares @ more - self._explained(more, rows))

    def _gain(self, params: MixtureParams, mass: Floats, estimate: float, error: float, step: int) -> Gain:
        taken = np.array([self.taken, regularisation(params, self.reg_covar)])
        exact = exact_gain(self.point, params, self.reg_covar)
        estimate = regularised_gain(estimate, np.array([self.point.stats.mass, mass]), taken)
        return Gain(exact, estimate, estimate - self.caution * error, step, error)

    def walk(self, most_steps: int, least: float = 0.0) -> Walk:
        """Accelerated steps to the largest lower confidence bound, at most ``most_steps``.

        It ends where two steps in a row gain less than ``least``, nats a row, or next to nothing. NumericalError where
        EM's own step, the first one, degenerates.
        """
        em = self.point.em_step(self.reg_covar)
        seen: list[tuple[MixtureParams, Gain]] = []

        def read(params: MixtureParams) -> SufficientStats:
            gain, stats = self.told(params, len(seen) + 1)
            seen.append((params, gain))
            return stats

        state, n_steps = Accelerated.at(em), 0
        best, gain, promised = em, Gain(0.0, 0.0, -inf, 0), exact_gain(self.point, em, self.reg_covar)
        while n_steps < min(most_steps, gain.step + PATIENCE) and state.quiet < QUIET:
            n_steps += 1
            try:
                state = state.learned(read, max(least, ARRIVED * gain.bound), self.reg_covar)
            except (NumericalError, np.linalg.LinAlgError):
                break
            params, last = seen[-1]
            promised = max(promised, last.estimate, last.exact)
            if last.bound > gain.bound:
                best, gain = params, last
        return Walk(best, gain, promised, n_steps, em)


def _scaled(point: Point, sample: Sample) -> Floats:
    """(d, m) the sample's rows in the units of a point's statistics."""
    return np.ascontiguousarray((sample.rows * point.stats.scale).T)


def _centred(scaled: Floats, stats: SufficientStats, component: int) -> Floats:
    """(d, m) the same about the origin of a component's statistics."""
    return np.asarray(scaled - (stats.origin[component] * stats.scale)[:, None])


def of_few_rows(stats: SufficientStats, size: float) -> Booleans:
    """(k,) components that have too few rows of a sample of this size to be followed on it.  stats: per row."""
    return np.asarray(stats.mass * size < FOLLOWED_ROWS * stats.moments.shape[1])


def _row_statistics(point: Point, sample: Sample, responsibilities: Floats, few: Booleans, out: Floats) -> None:
    """What each row of the sample adds to statistics like those of ``point``, into out (c, m); zero for some."""
    stats, scaled, (k, m) = point.stats, _scaled(point, sample), responsibilities.shape
    d, shared = len(stats.scale), len(stats.common) > 0
    rows = out[: stats.moments.size].reshape(k, stats.moments.shape[1], m)
    common = out[stats.moments.size :]
    common[:] = 0.0
    squares = np.empty_like(common)
    for j, mine in enumerate(responsibilities):
        z = _centred(scaled, stats, j)
        rows[j, 0] = mine
        rows[j, 1 : 1 + d] = mine * z
        stats.quadratic.expand(z, rows[j, 1 + d :])
        rows[j, 1 + d :] *= mine
        if few[j]:
            rows[j] = 0.0
        if shared:
            OUTER.expand(z, squares)
            squares *= mine
            common += squares


def _flat(stats: SufficientStats, few: Booleans) -> Floats:
    """(c,) in the order of ``_row_statistics``, zero where that is."""
    return np.concatenate([np.where(few[:, None], 0.0, stats.moments).ravel(), stats.common])


def _statistics(stats: SufficientStats, scaled: Floats, responsibilities: Floats, weights: Floats) -> SufficientStats:
    """Statistics like ``stats``, of the sample's rows with these weights, which sum to one."""
    d = len(stats.scale)
    moments, common = np.empty_like(stats.moments), np.zeros_like(stats.common)
    for j, mine in enumerate(responsibilities * weights):
        z = _centred(scaled, stats, j)
        moments[j, 0] = mine.sum()
        moments[j, 1 : 1 + d] = z @ mine
        moments[j, 1 + d :] = stats.quadratic.weighted_sum(z, mine)
        if len(common):
            common += OUTER.weighted_sum(z, mine)
    return replace(stats, moments=moments, common=common)


def _uncorrelated(columns: Floats, truth: Floats, shares: Floats) -> tuple[Floats, Floats, float]:
    """Controls (q, m) of mean zero, variance one and no correlation that span columns (c, m), which are overwritten.

    Those of next to no variance are left out.  truth: (c,) means of the columns over all rows; returned as well, (q,).
    The number is how far, in variance, the truth is from the sample in what was left out, where it cannot be by chance.
    """
    means = columns @ shares
    columns -= means[:, None]
    away = truth - means
    spread = np.sqrt(np.einsum("cm,cm,m->c", columns, columns, shares))
    apart = spread > np.sqrt(np.finfo(np.float64).tiny) + COLLINEAR * np.abs(means)
    if (np.abs(away) > COLLINEAR * (1.0 + np.abs(means)))[~apart].any():
        return np.empty((0, len(shares))), np.empty(0), inf  # all rows of the sample are alike, and others are not
    inverse = np.where(apart, 1.0 / np.where(apart, spread, 1.0), 0.0)
    columns *= inverse[:, None]
    away *= inverse
    variances, axes = np.linalg.eigh(_covariance(columns, shares))
    kept = variances > COLLINEAR
    missed = float(((away @ axes[:, ~kept]) ** 2).max(initial=0.0)) / COLLINEAR
    axes = (axes[:, kept] / np.sqrt(variances[kept])).T
    return axes @ columns, axes @ away, missed


def _covariance(columns: Floats, shares: Floats) -> Floats:
    """(c, c) of columns (c, m) of mean zero, a part of the rows at a time."""
    found = np.zeros((len(columns), len(columns)))
    for start in range(0, len(shares), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        found += (columns[:, part] * shares[part]) @ columns[:, part].T
    return found


def _calibrated(controls: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Weights (m,) around one with which the controls' means are ``target``, and the controls for which that is so.

    Where a row's weight would be below LEAST_WEIGHT, the combination of controls that tells most of this row is given
    up; the row then counts once, and the others are uncorrelated as before.
    """
    weights = 1.0 + target @ controls
    while weights.min() < LEAST_WEIGHT:
        direction = controls[:, weights.argmin()]
        direction = direction / np.sqrt(direction @ direction)
        controls = controls - np.outer(direction, direction @ controls)
        target = target - direction * (direction @ target)
        weights = 1.0 + target @ controls
    return weights, controls
