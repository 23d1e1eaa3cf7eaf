"""Sufficient statistics: the small value that a block of rows leaves behind, and how it adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Floats, Integers
from streamgmm.quadratic import OUTER, AbstractQuadratic

#: Below this a component's mass is made of responsibilities that were clipped, and its moments mean nothing.
LEAST_MASS = 1e-250


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates z = (x - shift) * scale in which rows are squared and summed.

    shift: (d,) in the data's units.  scale: (d,) powers of two, so that scaling is exact.
    """

    shift: Floats
    scale: Floats

    @property
    def log_volume(self) -> float:
        """log |dz/dx|: what a log density in z gains on its way to the data's units."""
        return float(np.log(self.scale).sum())


@dataclass(frozen=True, eq=False)
class SufficientStats:
    """What EM needs to know of some rows, per component k: sum r, sum r z, sum r Q(z).

    Coordinates are z = (x - origin) * scale with one origin a component.

    moments: (k, 1 + d + q): mass | first | second.  common: the sum over components of the second moments that are
    not told apart (tied covariance), packed; empty otherwise.  origin: (k, d).  scale: (d,).  log_likelihood,
    log_likelihood_squares: sums of w log p(x) and of w (log p(x))^2, nats, in the data's units.  weight: sum of row
    weights.  n_rows, n_skipped: rows that count and rows that are left out.
    """

    quadratic: AbstractQuadratic
    moments: Floats
    common: Floats
    origin: Floats
    scale: Floats
    log_likelihood: float
    log_likelihood_squares: float
    weight: float
    n_rows: int
    n_skipped: int = 0

    @property
    def mass(self) -> Floats:
        """(k,) sums of responsibilities."""
        return self.moments[:, 0]

    @property
    def first(self) -> Floats:
        """(k, d) weighted sums of z."""
        return self.moments[:, 1 : 1 + len(self.scale)]

    @property
    def second(self) -> Floats:
        """(k, q) weighted sums of Q(z)."""
        return self.moments[:, 1 + len(self.scale) :]

    def __add__(self, other: SufficientStats) -> SufficientStats:
        """The statistics of both sets of rows. DataError where they are in different coordinates."""
        if not isinstance(other, SufficientStats):
            return NotImplemented
        self._require_same_coordinates(other)
        return replace(
            self,
            moments=self.moments + other.moments,
            common=self.common + other.common,
            log_likelihood=self.log_likelihood + other.log_likelihood,
            log_likelihood_squares=self.log_likelihood_squares + other.log_likelihood_squares,
            weight=self.weight + other.weight,
            n_rows=self.n_rows + other.n_rows,
            n_skipped=self.n_skipped + other.n_skipped,
        )

    def __sub__(self, other: SufficientStats) -> SufficientStats:
        """The statistics of the rows that ``other`` has not. DataError as for a sum."""
        less = other * -1.0
        return self + replace(less, n_rows=-less.n_rows, n_skipped=-less.n_skipped)

    def __mul__(self, factor: float) -> SufficientStats:
        """Every row weighted ``factor`` times as much; the two counts stay."""
        return replace(
            self,
            moments=self.moments * factor,
            common=self.common * factor,
            log_likelihood=self.log_likelihood * factor,
            log_likelihood_squares=self.log_likelihood_squares * factor,
            weight=self.weight * factor,
        )

    __rmul__ = __mul__

    def about(self, origin: Floats, scale: Floats) -> SufficientStats:
        """The same statistics in the coordinates z' = (x - origin) * scale; origin (k, d) or (d,), scale (d,).

        Q(a z + t) = Q(a) Q(z) + 2 B(a z, t) + Q(t), summed with the responsibilities.
        """
        origin = np.broadcast_to(origin, self.origin.shape)
        if np.array_equal(origin, self.origin) and np.array_equal(scale, self.scale):
            return self
        factor = scale / self.scale
        shift = (self.origin - origin) * scale
        mass, first = self.mass[:, None], self.first * factor
        second = self.second * self.quadratic.stretch(factor) + _shifted(self.quadratic, mass, first, shift)
        common = self.common
        if common.size:
            moved = _shifted(OUTER, mass, first, shift)
            common = common * OUTER.stretch(factor) + moved.sum(axis=0)
        moments = np.concatenate([mass, first + mass * shift, second], axis=1)
        return replace(self, moments=moments, common=common, origin=origin, scale=scale)

    def per_weight(self) -> SufficientStats:
        """The same for rows of weight one in all: moments, log-likelihood and weight divided by the weight."""
        return replace(
            self,
            moments=self.moments / self.weight,
            common=self.common / self.weight,
            log_likelihood=self.log_likelihood / self.weight,
            log_likelihood_squares=self.log_likelihood_squares / self.weight,
            weight=1.0,
        )

    def means(self) -> Floats:
        """(k, d) means of the components in the data's units; the origin of one whose mass is nothing."""
        mass = self.mass[:, None]
        offset = np.divide(self.first, mass, out=np.zeros_like(self.first), where=mass > LEAST_MASS)
        return self.origin + offset / self.scale

    def reordered(self, order: Integers) -> SufficientStats:
        """Components ``order``, the numbers they have now."""
        return replace(self, moments=self.moments[order], origin=self.origin[order])

    def blended(self, new: SufficientStats, step: float) -> SufficientStats:
        """(1 - step) times these statistics plus step times ``new``, about the means of the result.

        Both are of weight one. Nothing larger than the result is subtracted anywhere (Chan, Golub & LeVeque 1979), so
        the blend may go on for ever. The counts are those of both.
        """
        old_mass, new_mass = (1.0 - step) * self.mass, step * new.mass
        mass = old_mass + new_mass
        share = np.divide(new_mass, mass, out=np.zeros_like(mass), where=mass > LEAST_MASS)
        means = self.means()
        origin = means + share[:, None] * (new.means() - means)
        old, new = self.about(origin, new.scale), new.about(origin, new.scale)
        return replace(old * (1.0 - step) + new * step, weight=1.0)

    def _require_same_coordinates(self, other: SufficientStats) -> None:
        if self.quadratic != other.quadratic or self.moments.shape != other.moments.shape:
            raise DataError(
                f"These statistics do not add: {len(self.moments)} components of {type(self.quadratic).__name__} "
                f"features ({self.moments.shape[1]} moments) and {len(other.moments)} of "
                f"{type(other.quadratic).__name__} ({other.moments.shape[1]} moments). Take both with one model."
            )
        if not (np.array_equal(self.origin, other.origin) and np.array_equal(self.scale, other.scale)):
            raise DataError(
                "These statistics are in different coordinates and do not add: their origins or scales differ. "
                "Move one with .about(origin, scale) first."
            )


def _shifted(quadratic: AbstractQuadratic, mass: Floats, first: Floats, shift: Floats) -> Floats:
    """What sum r Q(z) gains when every z moves by ``shift``: 2 B(first, shift) + mass Q(shift)."""
    return 2.0 * quadratic.bilinear(first, shift) + mass * quadratic.bilinear(shift, shift)


@dataclass(frozen=True, eq=False)
class PerModel:
    """One value for every model that shares a read; adds model by model."""

    values: tuple[Any, ...]

    def __add__(self, other: PerModel) -> PerModel:
        return PerModel(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True, eq=False)
class Listed:
    """A value for each of some blocks, in their order; adds by putting one behind the other."""

    values: tuple[Any, ...]

    def __add__(self, other: Listed) -> Listed:
        return Listed(self.values + other.values)
