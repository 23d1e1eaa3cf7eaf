"""Rows to statistics, and statistics to parameters: the two halves of EM.

Everything is feature-major: a tile of b rows is (d, b), so every elementwise step is contiguous. In the packed form

    T = [1; z; Q(z)]   (F, b)      z = (x - shift) * scale
    L = eta @ T        (k, b)      log joint densities: one matrix product
    S = R @ T.T        (k, F)      all sufficient statistics: another

where eta are the natural parameters. The packed form subtracts numbers of the size of kappa to get a quadratic form, so
it loses eps * kappa; where that is too much a component, or a single row, takes the centred form, which subtracts the
mean from the row first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.covariance.base import mean_offsets
from streamgmm.covariance.roots import AbstractRoot
from streamgmm.errors import NumericalError
from streamgmm.loops import FAR, GROUP, PANEL_ROWS, Lens, scratch_numbers, softmax
from streamgmm.params import MixtureParams
from streamgmm.protocols import Block, Booleans, Floats, Integers
from streamgmm.quadratic import OUTER, AbstractQuadratic, pack
from streamgmm.stats import Frame, Listed, PerModel, SufficientStats
from streamgmm.tiles import Span, Tile, part_of, spans, tile_of, tiles

LOG_2PI = float(np.log(2.0 * np.pi))

#: Largest eps * kappa at which the packed form is used. Errors of densities stay below about ten times this.
GUARD_LIMIT = 1e-6

#: The same for the single precision that a fit may ask for: models and rows beyond it are seen in double precision.
SINGLE_GUARD_LIMIT = 1e-3

LARGEST = float(np.finfo(np.float64).max)

#: Sums of squared log densities stay so far below the largest float64 that those of any number of tiles do too.
LARGEST_SQUARES = 1e290

#: Below this a responsibility is one that was clipped, and adds nothing to a sum of rows.
LEAST_RESPONSIBILITY = 1e-290

#: Far rows that are looked at together: so few that they take no memory beside that of a tile.
FAR_ROWS = 64

#: Variances in z, where the data's own are about one, that count as zero.
LEAST_VARIANCE = 1e-200

#: (largest F, rows of a tile): tiles of which NumPy makes few, and which stay in the cache. Spans are made of them.
TILE_ROWS = ((6, 8192), (64, 4096), (160, 1024))
TILE_ROWS_BEYOND = 256

#: Tiles that the compiled loops take at once: so many that calling them costs nothing.
SPAN_TILES = 4

#: Single precision is given up for the rest of a block where it has refused so many rows, and this part of them.
TRIED_ROWS, MOST_REFUSED = 4096, 0.25


def tile_rows(n_moments: int) -> int:
    """Rows of a tile for F features. A constant of the shape, never of the machine: the bits depend on it."""
    return next((rows for largest, rows in TILE_ROWS if n_moments <= largest), TILE_ROWS_BEYOND)


def workspace_bytes(structure: type[AbstractCovariance], k: int, d: int, n_models: int) -> int:
    """Bytes that e_step allocates beside the rows: a span and a tile of them, and for each model its sums and what the
    loops need, in both precisions."""
    n_moments = 1 + d + structure.quadratic.size(d)
    rows = tile_rows(n_moments)
    tile = rows * (n_moments + (SPAN_TILES + 4) * d + 2 * k + SPAN_TILES)
    sums = scratch_numbers(d, k, n_moments, structure.shared) + 6 * (k + GROUP) * (n_moments + GROUP) + 4 * d * d
    return 8 * tile + (8 + 4) * n_models * sums


@dataclass(frozen=True, eq=False)
class Scorer:
    """Mixture parameters made ready for rows in the coordinates of ``frame``.

    eta: (p, F) natural parameters of the components in packed form, whose numbers are ``packed``; the others are
    ``centred``. offsets: (k, d) means in z. constants: (k,) log weight plus log density of z at the mean.
    reach: (d,) a row with sum reach * z^2 above the guard's limit takes the centred form.  single: whether E-steps may
    be made in single precision.
    """

    frame: Frame
    quadratic: AbstractQuadratic
    shared: bool
    root: AbstractRoot
    offsets: Floats
    constants: Floats
    eta: Floats
    packed: Integers
    centred: Integers
    reach: Floats
    single: bool

    @property
    def n_components(self) -> int:
        return len(self.constants)

    @property
    def n_moments(self) -> int:
        """F = 1 + d + q."""
        d = len(self.reach)
        return 1 + d + self.quadratic.size(d)

    @property
    def tile_rows(self) -> int:
        return tile_rows(self.n_moments)


def prepare(params: MixtureParams, frame: Frame, *, single: bool = False) -> Scorer:
    """Cholesky factors, natural parameters and the form that each component takes.

    single: whether E-steps are to be made in single precision where the guard allows it. Raises NumericalError, naming
    the component, where a covariance is not positive definite.
    """
    k, d = params.means.shape
    covariance = params.covariance.scaled(frame.scale)
    offsets = (params.means - frame.shift) * frame.scale
    root = covariance.root(k, d)
    with np.errstate(divide="ignore"):
        log_weights = np.log(params.weights)
    constants = log_weights + root.log_det - 0.5 * d * LOG_2PI
    linear = root.precision_times(offsets)
    at_zero = constants - 0.5 * (linear * offsets).sum(axis=1)
    eta = np.concatenate([at_zero[:, None], linear, covariance.natural_quadratic(root)], axis=1)
    kappa = _kappa(root.precision_diagonal, offsets, covariance.variances(k, d))
    centred = _centred_components(covariance, d, kappa)
    packed = np.flatnonzero(~centred)
    reach = root.precision_diagonal[packed].max(axis=0, initial=0.0)
    return Scorer(
        frame,
        covariance.quadratic,
        covariance.shared,
        root,
        offsets,
        constants,
        eta[packed],
        packed,
        np.flatnonzero(centred),
        reach,
        single and not centred.any() and bool(np.finfo(np.float32).eps * kappa.max() <= SINGLE_GUARD_LIMIT),
    )


def _kappa(precision: Floats, offsets: Floats, variances: Floats) -> Floats:
    """(k,) sum_i P_ii (|m_i| + 8 sd_i)^2, which does not change with the units of any feature.

    It bounds the size of the terms that cancel in z^T P z - 2 m^T P z + m^T P m for rows up to eight deviations from
    the mean.
    """
    return np.asarray((precision * (np.abs(offsets) + 8.0 * np.sqrt(variances)) ** 2).sum(axis=1))


def _centred_components(covariance: AbstractCovariance, d: int, kappa: Floats) -> Booleans:
    """Which components take the centred form."""
    k = len(kappa)
    centred = np.finfo(np.float64).eps * kappa > GUARD_LIMIT
    if covariance.shared:
        # one common second moment: all components about the frame's origin, or each about its own mean
        return np.full(k, centred.any())
    # making d (d + 1) / 2 products of every row costs more than k small matrix products where components are very few
    return np.asarray(centred | (covariance.quadratic == OUTER and 8 * k < d))


@np.errstate(over="ignore", invalid="ignore")  # a density that overflows is seen by its caller
def log_joint(scorer: Scorer, tile: Tile, out: Floats) -> None:
    """log(weight_k) + log N(z | k) for every component and row of a tile, into out (k, b): nats, in the units of z.

    The data's units differ by the frame's log volume, which callers add last: so a change of units by powers of two
    changes no bit of a responsibility.
    """
    features, d = tile.features, len(scorer.reach)
    z = features[1 : 1 + d]
    packed = scorer.packed
    if len(packed) == scorer.n_components:
        np.matmul(scorer.eta, features, out=out)
    elif len(packed):
        out[packed] = scorer.eta @ features
    if scorer.shared and len(packed):
        out -= 0.5 * _squared_length(scorer.root.whiten(0, z))
    for k in scorer.centred:
        out[k] = _centred_log_joint(scorer, k, z)
    if len(packed):
        limit = GUARD_LIMIT / np.finfo(np.float64).eps
        far = np.flatnonzero(scorer.reach @ (z * z) > limit)
        if len(far):
            for k in packed:
                out[k, far] = _centred_log_joint(scorer, k, z[:, far])


def _centred_log_joint(scorer: Scorer, k: int, z: Floats) -> Floats:
    whitened = scorer.root.whiten(k, z - scorer.offsets[k][:, None])
    return np.asarray(scorer.constants[k] - 0.5 * _squared_length(whitened))


def _squared_length(columns: Floats) -> Floats:
    return np.einsum("ib,ib->b", columns, columns)


def responsibilities(scorer: Scorer, tile: Tile, joint: Floats) -> Floats:
    """Fill ``joint`` (k, b) with responsibilities; returns the log densities (b,) of z, in nats.

    A row so far out that all its squared distances overflow has log density -inf, and responsibilities nevertheless.
    """
    log_joint(scorer, tile, joint)
    top: Floats = joint.max(axis=0)
    far = np.flatnonzero(~(top > FAR))
    top[far] = np.nan_to_num(top[far], nan=-np.inf, neginf=-np.inf)
    for start in range(0, len(far), FAR_ROWS):
        part = far[start : start + FAR_ROWS]
        z = tile.features[1 : 1 + len(scorer.reach), part]
        nearest = _nearest(scorer, z)
        for k in np.unique(nearest):
            joint[:, part[nearest == k]] = _far_log_joint(scorer, int(k), z[:, nearest == k])
    density = softmax(joint)
    density[far] += top[far]
    return density


def _nearest(scorer: Scorer, z: Floats) -> Integers:
    """(b,) the component with the smallest squared distance from each far row, whose squares may overflow."""
    size = np.abs(z).max(axis=0)
    squares = np.full((scorer.n_components, z.shape[1]), np.inf)
    for k in np.flatnonzero(scorer.constants > -np.inf):  # a component without weight is nowhere the nearest
        squares[k] = _squared_length(scorer.root.whiten(int(k), z / size - scorer.offsets[k][:, None] / size))
    return np.asarray(squares.argmin(axis=0))


@np.errstate(over="ignore", invalid="ignore")
def _far_log_joint(scorer: Scorer, near: int, z: Floats) -> Floats:
    """(k, b) log joint densities of rows that are far from all components, each row up to a number of its own.

    Their squared distances are so large that what tells components apart is lost in the last digit, or overflow. With
    v the row seen from the mean of the component ``near``, a_k the way from there to another mean, s the largest
    coordinate of v and u = v / s, the squared distance from k is larger than that from ``near`` by

        v^T (P_k - P_near) v - 2 a_k^T P_k v + a_k^T P_k a_k = s (v^T (P_k - P_near) u - 2 a_k^T P_k u) + a_k^T P_k a_k
    """
    v = z - scorer.offsets[near][:, None]
    size = np.abs(v).max(axis=0)
    u = v / size
    slope = np.empty((scorer.n_components, z.shape[1]))
    constants = scorer.constants.copy()
    for k, apart in enumerate(scorer.offsets - scorer.offsets[near]):
        way = scorer.root.whiten(k, apart[:, None])
        difference = scorer.root.precision_apart(k, near, u)
        square = (v * difference).sum(axis=0)
        square = np.where(np.isfinite(square), square, size * (u * difference).sum(axis=0))
        slope[k] = (way * scorer.root.whiten(k, u)).sum(axis=0) - 0.5 * square
        constants[k] -= 0.5 * (way**2).sum()
    slope[np.isneginf(scorer.constants)] = -np.inf
    slope -= slope.max(axis=0)
    joint = np.maximum(constants, -LARGEST)[:, None] + size * slope
    return np.asarray(joint - joint.max(axis=0))


def require_densities(log_density: Floats, block: Block, row: int) -> None:
    """NumericalError for the first row, counted from ``row``, whose density is zero under every component."""
    if not np.isfinite(log_density).all():
        bad = int(np.flatnonzero(~np.isfinite(log_density))[0])
        raise NumericalError(
            f"The density of {block.locate(row + bad, 0)} cannot be computed: the row lies so far from every component "
            "that its squared distance overflows float64. Remove the row, or rescale its features."
        )


def scored_tiles(scorer: Scorer, block: Block) -> Iterator[tuple[Tile, Floats, Floats]]:
    """Each tile with responsibilities (k, b) and log densities (b,), nats in the data's units.

    Buffers are used again for the next tile.
    """
    joint = np.empty((scorer.n_components, min(scorer.tile_rows, block.stop - block.start)))
    for tile in tiles(block, scorer.frame, scorer.quadratic, scorer.tile_rows, products=len(scorer.packed) > 0):
        part = part_of(joint, tile.features.shape[1])
        yield tile, part, responsibilities(scorer, tile, part) + scorer.frame.log_volume


def e_step(scorers: tuple[Scorer, ...], block: Block) -> PerModel:
    """The E-step of every model on one block, in one read: a SufficientStats for each scorer.

    The scorers share their frame and structure (the restarts of one fit).
    """
    room = _Room()
    sums = [_Sums(scorer, room) for scorer in scorers]
    for span in spans(block, SPAN_TILES * scorers[0].tile_rows):
        for total in sums:
            total.learn(span, block)
        del span  # else what it is a view of lives while more is read
    return PerModel(tuple(total.stats() for total in sums))


def e_step_each(scorer: Scorer, block: Block) -> Listed:
    """The E-step of one model on one block; a sum over blocks keeps the SufficientStats of each of them apart."""
    return Listed(e_step((scorer,), block).values)


def score_rows(scorer: Scorer, block: Block) -> Listed:
    """The log density (nats) and the responsibilities of every row of a block: (1 + k, b)."""
    out = np.empty((1 + scorer.n_components, block.stop - block.start))
    filled = 0
    for tile, resp, log_density in scored_tiles(scorer, block):
        require_densities(log_density, block, tile.row)
        end = filled + len(log_density)
        out[0, filled:end], out[1:, filled:end] = log_density, resp
        filled = end
    return Listed((out,))


class _Room:
    """Memory for one matrix at a time."""

    def __init__(self) -> None:
        self.numbers = np.empty(0)

    def shaped(self, m: int, n: int) -> Floats:
        """An (m, n) matrix, whatever was in it."""
        if self.numbers.size < m * n:
            self.numbers = np.empty(m * n)
        return self.numbers[: m * n].reshape(m, n)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the rows that one lens took tell of a model; see ``Lens.learn``."""

    lens: Lens
    tally: Floats
    square: Floats | None
    totals: Floats

    @classmethod
    def through(cls, lens: Lens, scorer: Scorer) -> _Seen:
        d = len(scorer.reach)
        square = np.zeros((d, d)) if scorer.shared else None
        return cls(lens, lens.tally(), square, np.zeros(4))

    @property
    def moments(self) -> Floats:
        return self.lens.moments(self.tally)

    def learn(self, span: Span, block: Block) -> int:
        """Returns how many of the first rows were learned."""
        return self.lens.learn(span.rows, span.weights, block.omits_nan, self.tally, self.square, self.totals)

    def rounded_off(self, scorer: Scorer) -> float:
        """What the log-likelihood lacks because the lens has natural parameters of single precision.

        To first order, for the derivative of the log-likelihood by eta is the moments. Left alone it would be a bias of
        1e-7 nats a row, another one for each mixture.
        """
        known = np.isfinite(scorer.eta)  # a component without weight is as absent in either precision
        difference = np.where(known, scorer.eta, 0.0) - np.where(known, self.lens.eta, 0.0)
        lacking = float((difference * self.moments).sum())
        if self.square is not None:
            exact, rounded = scorer.root.whiten(0, np.eye(len(scorer.reach))), self.lens.whitener.astype(np.float64)
            lacking -= 0.5 * float(((exact.T @ exact - rounded.T @ rounded) * self.square).sum())
        return lacking


class _Sums:
    """Running sums of one model over the spans of one block.

    The compiled loops take panels of rows that are near to components that are all packed; others go tile by tile.
    """

    def __init__(self, scorer: Scorer, room: _Room) -> None:
        d = len(scorer.reach)
        self.scorer = scorer
        self.seen = [_Seen.through(lens, scorer) for lens in _lenses(scorer)]
        self.moments = np.zeros((scorer.n_components, scorer.n_moments))
        self.common = np.zeros(OUTER.size(d) if scorer.shared else 0)
        self.totals = np.zeros(4)
        self.n_rows = 0
        self.n_refused = 0
        self.room = room

    def learn(self, span: Span, block: Block) -> None:
        """Add the statistics of a span: what one lens cannot take, a panel at a time, the next one may."""
        start, n = 0, len(span.rows)
        while start < n:
            stop = n if self.seen else min(start + self.scorer.tile_rows, n)
            for seen in self._useful():
                start += seen.learn(span.part(start, stop), block)
                if start == stop:
                    break
                self.n_refused += PANEL_ROWS
                stop = min(start + PANEL_ROWS, n)
            else:
                self._learn_tile(span.part(start, stop), block)
                start = stop
        self.n_rows += n

    def _useful(self) -> list[_Seen]:
        """The lenses that are tried: single precision is no more where it has refused too many of the rows so far."""
        vain = len(self.seen) > 1 and self.n_refused > TRIED_ROWS + MOST_REFUSED * self.n_rows
        return self.seen[1:] if vain else self.seen

    def _learn_tile(self, span: Span, block: Block) -> None:
        """Add the statistics of a tile."""
        scorer, n_rows = self.scorer, len(span.rows)
        n_moments = scorer.n_moments if len(scorer.packed) else 1 + len(scorer.reach)
        room = self.room.shaped(n_moments + scorer.n_components, n_rows)
        tile = tile_of(span, block, scorer.frame, scorer.quadratic, room[:n_moments])
        resp = room[n_moments:]
        log_density = responsibilities(scorer, tile, resp)
        require_densities(log_density, block, tile.row)
        weighted = log_density
        if tile.weights is not None:
            resp *= tile.weights
            weighted = log_density * tile.weights
        with np.errstate(over="ignore"):  # of rows that are very far
            squares = min(float(weighted @ log_density), LARGEST_SQUARES)
        weight = float(n_rows if tile.weights is None else tile.weights.sum())
        self.totals += (float(weighted.sum()), squares, weight, tile.n_skipped)
        self._add_moments(tile, resp)

    def _add_moments(self, tile: Tile, resp: Floats) -> None:
        scorer, d = self.scorer, len(self.scorer.reach)
        z = tile.features[1 : 1 + d]
        if len(scorer.packed) == scorer.n_components:
            self.moments += resp @ tile.features.T
        elif len(scorer.packed):
            self.moments[scorer.packed] += resp[scorer.packed] @ tile.features.T
        if scorer.shared and len(scorer.packed):
            row_weights = np.ones(z.shape[1]) if tile.weights is None else tile.weights
            self.common += OUTER.weighted_sum(z, row_weights)
        nothing = LEAST_RESPONSIBILITY * (1.0 if tile.weights is None else tile.weights.max())
        for k in scorer.centred:
            self.moments[k, 0] += resp[k].sum()
            if resp[k].max() <= nothing:  # as in almost all tiles where a lone far row has a component to itself
                continue
            centred = z - scorer.offsets[k][:, None]
            self.moments[k, 1 : 1 + d] += centred @ resp[k]
            self.moments[k, 1 + d :] += scorer.quadratic.weighted_sum(centred, resp[k])
            if scorer.shared:
                self.common += OUTER.weighted_sum(centred, resp[k])

    def stats(self) -> SufficientStats:
        scorer, frame = self.scorer, self.scorer.frame
        volume = frame.log_volume
        moments, common, totals = self.moments, self.common, self.totals
        for seen in self.seen:
            moments, totals = moments + seen.moments, totals + seen.totals
            totals[0] += seen.rounded_off(scorer)
            if seen.square is not None:
                common = common + pack(seen.square)
        log_likelihood, squares, weight, n_skipped = totals.tolist()
        origin = np.tile(frame.shift, (scorer.n_components, 1))
        # the mean as the scorer has it: offsets are what was subtracted, bit for bit
        origin[scorer.centred] = frame.shift + scorer.offsets[scorer.centred] / frame.scale
        return SufficientStats(
            scorer.quadratic,
            moments,
            common,
            origin,
            frame.scale,
            log_likelihood + weight * volume,
            squares + (2.0 * log_likelihood + weight * volume) * volume,
            weight,
            self.n_rows - int(n_skipped),
            int(n_skipped),
        )


def _lenses(scorer: Scorer) -> list[Lens]:
    """A model for the compiled loops, in single precision first where it may be: none unless all its components are
    packed."""
    if len(scorer.centred):
        return []
    frame, d = scorer.frame, len(scorer.reach)
    whitener = scorer.root.whiten(0, np.eye(d)) if scorer.shared else None
    limits = {np.float32: SINGLE_GUARD_LIMIT, np.float64: GUARD_LIMIT}
    return [
        Lens(
            frame.shift,
            frame.scale,
            scorer.quadratic.terms(d),
            scorer.eta,
            whitener,
            scorer.reach,
            float(limits[dtype] / np.finfo(dtype).eps),
            dtype,
        )
        for dtype in ((np.float32, np.float64) if scorer.single else (np.float64,))
    ]


@dataclass(frozen=True)
class MStepReport:
    """What the M-step had to do beside the formula. starved: components that kept their mean and covariance."""

    starved: tuple[int, ...]


def m_step(
    stats: SufficientStats, previous: MixtureParams, reg_covar: float, least_share: float = 0.0
) -> tuple[MixtureParams, MStepReport]:
    """Weights, means and covariances that maximise the expected complete log-likelihood (Dempster et al. 1977, sec. 4).

    reg_covar: added to the variances, in the data's units squared, as scikit-learn does. A component whose share of
    the rows is lost in rounding, or below ``least_share``, keeps the mean and covariance of ``previous``. Raises
    NumericalError where a statistic is not finite.
    """
    if not (np.isfinite(stats.moments).all() and np.isfinite(stats.common).all()):
        raise NumericalError(
            "The sufficient statistics are not finite: squares of the data overflow float64. Divide the features by a "
            "power of ten that brings them below about 1e150."
        )
    mass, alive = stats.mass, _alive(stats, least_share)
    _, offset = mean_offsets(stats, alive)
    means = np.where(alive[:, None], stats.origin + offset / stats.scale, previous.means)
    covariance = previous.covariance.scaled(stats.scale).updated(stats, alive, reg_covar * stats.scale**2)
    # rows at LOG_FLOOR weigh about 1e-300 each: a variance made of them alone is that of a collapsed component
    collapsed = np.abs(covariance.values) < LEAST_VARIANCE
    covariance = type(covariance)(np.where(collapsed, 0.0, covariance.values)).scaled(1.0 / stats.scale)
    return MixtureParams(mass / mass.sum(), means, covariance), MStepReport(_numbers(~alive))


def starved_components(stats: SufficientStats) -> tuple[int, ...]:
    """Components that keep their mean and covariance in the M-step of these statistics."""
    return _numbers(~_alive(stats, 0.0))


def _alive(stats: SufficientStats, least_share: float) -> Booleans:
    return np.asarray(stats.mass > max(10.0 * np.finfo(np.float64).eps, least_share) * stats.weight)


def _numbers(chosen: Booleans) -> tuple[int, ...]:
    return tuple(map(int, np.flatnonzero(chosen)))
