"""The read before fitting: counts, moments, a finite check and a uniform sample of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from streamgmm.draw import Copies, Draw
from streamgmm.errors import DataError, NothingLeftError, NumericalError
from streamgmm.linalg import power_of_two
from streamgmm.protocols import Block, Executor, Floats, Integers, Readable
from streamgmm.quadratic import OUTER, unpack
from streamgmm.stats import Frame, SufficientStats
from streamgmm.tiles import Tile, tiles

#: Numbers of the tiles in which rows are surveyed, and the fewest rows. Constants, for the bits depend on them.
SURVEY_NUMBERS = 2**14
FEWEST_SURVEY_ROWS = 1024
#: Below this the square of a deviation loses digits, and soon vanishes.
SMALLEST_VARIANCE = 1e-290


@dataclass(frozen=True, eq=False)
class Survey:
    """What a run of blocks leaves behind in the pilot read: moments about their own mean, and its rows of the sample.

    sample: (rows, weights) of each block, in order, as views that no merge copies.  copies: of each block, the rows
    that were drawn by what they hold.
    """

    moments: SufficientStats
    sample: tuple[tuple[Floats, Floats], ...]
    copies: tuple[Copies, ...] = ()

    def __add__(self, other: Survey) -> Survey:
        """Chan, Golub & LeVeque (1979): both sides are moved to the mean of the two, so that nothing large cancels."""
        a, b = self.moments, other.moments
        scale = np.minimum(a.scale, b.scale)
        mean = _mean_of(a, b)
        return Survey(
            a.about(mean, scale) + b.about(mean, scale), self.sample + other.sample, self.copies + other.copies
        )


@dataclass(frozen=True, eq=False)
class Pilot:
    """What is known of the data before the first pass.

    mean (d,), covariance (d, d): of all rows, in the data's units. n_rows, n_skipped: rows that count and rows that are
    left out. weight: the sum of their weights.
    sample (m, d), sample_weights (m,): rows drawn uniformly without replacement, in row order; or, where ``any_order``,
    by what they hold: the same ones in whatever order rows lie, each once, with the weight of all its copies.
    """

    mean: Floats
    covariance: Floats
    n_rows: int
    n_skipped: int
    weight: float
    sample: Floats
    sample_weights: Floats
    any_order: bool = False

    def frame(self, *, isotropic: bool) -> Frame:
        """Coordinates with the sample's medians at zero and deviations in [0.5, 1); one scale for all where isotropic.

        Those of the sample, for the mean and the deviation of all rows may be made by a single far one: components
        would then lie so far from the origin that all of them had to take the centred form.
        """
        variances = np.diagonal(self.covariance)
        shift = self.mean
        if len(self.sample):
            shift = np.median(self.sample, axis=0)
            with np.errstate(over="ignore"):  # an overflow is no better than nothing
                mean = np.average(self.sample, axis=0, weights=self.sample_weights)
                spread = np.average((self.sample - mean) ** 2, axis=0, weights=self.sample_weights)
            variances = np.where((spread > 0) & np.isfinite(spread), spread, variances)
        if isotropic:
            variances = np.full_like(variances, variances.max())
        return Frame(shift, power_of_two(np.sqrt(variances)))


def take_pilot(source: Readable, executor: Executor, sample_index: Integers, draw: Draw | None = None) -> Pilot:
    """Read every row once. sample_index: (m,) rising row numbers to bring back.

    draw: of rows by what they hold, which are the sample where they are an even one.
    Raises DataError where a value is not finite or all weights are zero; NumericalError where squares overflow.
    """
    survey = executor.map_reduce(survey_block, (sample_index, draw), source.blocks(), source.graph)
    moments = survey.moments
    if not moments.n_rows:
        raise NothingLeftError(
            f"All {moments.n_skipped} rows of {source.name} have NaN in some feature, so none is left. Drop the "
            "feature that is missing everywhere, or fill it in."
        )
    if not moments.weight > 0:
        raise DataError(
            f"All {moments.n_rows} rows of {source.name} have weight zero. At least one must count for something."
        )
    mean = _mean_of(moments)
    moments = moments.about(mean, moments.scale)
    inverse = 1.0 / moments.scale
    with np.errstate(over="ignore", invalid="ignore"):  # said in words below
        covariance = unpack(moments.second[0], len(mean)) / moments.weight * np.outer(inverse, inverse)
    if not (np.isfinite(covariance).all() and np.isfinite(mean).all()):
        feature = int(np.flatnonzero(~np.isfinite(np.diagonal(covariance)))[0])
        raise NumericalError(
            f"The variance of feature {feature} of {source.name} overflows float64: its values are beyond about "
            "1e150. Divide it by a power of ten."
        )
    vanished = (np.diagonal(unpack(moments.second[0], len(mean))) > 0) & (np.diagonal(covariance) < SMALLEST_VARIANCE)
    if vanished.any():
        feature = int(np.flatnonzero(vanished)[0])
        raise NumericalError(
            f"The variance of feature {feature} of {source.name} underflows float64: its values differ by less than "
            "about 1e-145. Multiply it by a power of ten."
        )
    sample = np.concatenate([np.empty((0, len(mean))), *(rows for rows, _ in survey.sample)])
    weights = np.concatenate([np.empty(0), *(weights for _, weights in survey.sample)])
    pilot = Pilot(mean, covariance, moments.n_rows, moments.n_skipped, moments.weight, sample, weights)
    return pilot if draw is None else _in_any_order(pilot, draw, survey.copies)


def _in_any_order(pilot: Pilot, draw: Draw, drawn: Sequence[Copies]) -> Pilot:
    """The pilot with a sample that is the same in whatever order rows lie, where that is an even one."""
    if draw.all_rows:
        order = draw.order(pilot.sample, pilot.sample_weights)
        return replace(pilot, sample=pilot.sample[order], sample_weights=pilot.sample_weights[order], any_order=True)
    copies = Copies.joined(drawn, len(pilot.mean))
    if not copies.even(draw.by_number(pilot.sample, pilot.sample_weights)):
        return pilot
    return replace(pilot, sample=copies.rows, sample_weights=copies.row_weights, any_order=True)


def survey_rows(d: int) -> int:
    """Rows of the tiles in which rows of d features are surveyed."""
    return max(FEWEST_SURVEY_ROWS, SURVEY_NUMBERS // d)


def survey_block(wanted: tuple[Integers, Draw | None], block: Block) -> Survey:
    """Moments of one block about its own mean, and those of its rows that are in the sample (row, ascending)."""
    sample_index, draw = wanted
    d = block.n_features
    plain = Frame(np.zeros(d), np.ones(d))
    surveys = (
        Survey(_moments(tile), _sampled(tile, sample_index), _drawn(tile, draw))
        for tile in tiles(block, plain, OUTER, survey_rows(d), products=False)
    )
    survey = reduce(add, surveys)
    # copies of a row may be many: one of each block is kept
    return replace(survey, copies=(Copies.joined(survey.copies, d),)) if survey.copies else survey


def _moments(tile: Tile) -> SufficientStats:
    """The statistics of one tile as a mixture of one, about (almost) its own mean: what merges without cancelling."""
    x = tile.features[1:]
    weights = np.ones(x.shape[1]) if tile.weights is None else tile.weights
    weight = float(weights.sum())
    start = x[:, :1]
    origin = start[:, 0] + (x - start) @ weights / (weight or 1.0)
    centred = (x - origin[:, None]) * (weights > 0)
    scale = power_of_two(np.abs(centred).max(axis=1))
    z = centred * scale[:, None]
    moments = np.concatenate([[weight], z @ weights, OUTER.weighted_sum(z, weights)])
    n_rows = x.shape[1] - tile.n_skipped
    empty = np.empty(0)
    return SufficientStats(OUTER, moments[None], empty, origin[None], scale, 0.0, 0.0, weight, n_rows, tile.n_skipped)


def _sampled(tile: Tile, sample_index: Integers) -> tuple[tuple[Floats, Floats], ...]:
    """The sampled rows (m, d) of a tile that count for something, and their weights (m,); nothing where it has none.

    Large data have far more tiles than the sample has rows: what most tiles leave behind must take no memory.
    """
    x = tile.features[1:]
    ends = np.searchsorted(sample_index, (tile.row, tile.row + x.shape[1]))
    columns, weights = _that_count(tile, sample_index[ends[0] : ends[1]] - tile.row)
    return ((x.T[columns], weights),) if len(columns) else ()


def _drawn(tile: Tile, draw: Draw | None) -> tuple[Copies, ...]:
    """The same of the rows of a tile that are drawn by what they hold."""
    if draw is None or draw.all_rows:
        return ()
    keys = draw.keys(tile.features[1:])
    columns, weights = _that_count(tile, draw.drawn(keys))
    copies = Copies(tile.features[1:].T[columns] + 0.0, keys[columns], weights, np.ones(len(columns)))
    if draw.many(len(columns), len(keys)):  # one row may be repeated, and must not take the memory of a block
        copies = copies.distinct()
    return (copies,) if len(columns) else ()


def _that_count(tile: Tile, columns: Integers) -> tuple[Integers, Floats]:
    """Those of these rows of a tile that count for something, and their weights."""
    weights = np.ones(len(columns)) if tile.weights is None else tile.weights[columns]
    counts = weights > 0
    return columns[counts], weights[counts]


def _mean_of(*parts: SufficientStats) -> Floats:
    """The mean (d,) of the rows of one or two parts, taken about the origin of the first: exact to rounding."""
    origin = parts[0].origin[0]
    weight = sum(part.weight for part in parts) or 1.0
    offset = sum(part.mass[0] * (part.origin[0] - origin) + part.first[0] / part.scale for part in parts)
    return np.asarray(origin + offset / weight)
