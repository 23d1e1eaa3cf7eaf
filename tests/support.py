"""Small mixtures for the laws, rows cut in every way, and the sums of absolute terms that tolerances are parts of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from streamgmm.covariance import STRUCTURES
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.protocols import Piece
from streamgmm.stats import Frame, SufficientStats

KINDS = tuple(STRUCTURES)


@dataclass(frozen=True)
class Case:
    """What a small problem is made of; ``mixture`` and ``rows`` follow from it."""

    k: int
    d: int
    n: int
    seed: int
    offset: float = 0.0

    def mixture(self, kind: str) -> MixtureParams:
        """A mixture whose components overlap, so that every responsibility counts."""
        rng = np.random.default_rng([self.seed, 1])
        factors = rng.standard_normal((self.k, self.d, self.d))
        dense = factors @ factors.transpose(0, 2, 1) / self.d + 0.5 * np.eye(self.d)
        means = 1.5 * rng.standard_normal((self.k, self.d)) + self.offset
        return MixtureParams(rng.dirichlet(np.full(self.k, 5.0)), means, STRUCTURES[kind].from_dense(dense))

    def start(self, kind: str) -> MixtureParams:
        """A start near the truth, from which no component collapses."""
        covariance = STRUCTURES[kind].from_dense(1.5 * self.mixture("full").covariance.values)
        return MixtureParams(np.full(self.k, 1.0 / self.k), self._centres() + self.offset, covariance)

    def _centres(self) -> np.ndarray:
        return 2.5 * np.random.default_rng([self.seed, 4]).standard_normal((self.k, self.d))

    def rows(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 2])
        centres = self._centres()
        labels = rng.integers(self.k, size=self.n)
        return centres[labels] + rng.standard_normal((self.n, self.d)) * rng.uniform(0.5, 1.5, self.d) + self.offset

    def counts(self) -> np.ndarray:
        """(n,) whole weights, of which some are zero and not all."""
        weights = np.random.default_rng([self.seed, 3]).integers(0, 4, self.n)
        weights[0] = 2
        return weights


def cases(n: tuple[int, int] = (1, 60)) -> st.SearchStrategy[Case]:
    """Mixtures of up to 4 components in up to 6 features; where d > 2k the centred form is taken anyway."""
    offsets = st.sampled_from([0.0, -3.0, 1e3])
    return st.builds(Case, st.integers(1, 4), st.integers(1, 6), st.integers(*n), st.integers(0, 2**32), offsets)


#: where to cut, as fractions of the rows
cut_places = st.lists(st.floats(0, 1, width=32), max_size=24)


def cut_at(n: int, places: Sequence[float]) -> list[tuple[int, int]]:
    """[start, stop) runs of n rows, at least one row in each."""
    inner = {round(place * n) for place in places} - {0, n}
    ends = [0, *sorted(inner), n]
    return list(pairwise(ends))


@dataclass(frozen=True, eq=False)
class CutBlock:
    """Rows [start, stop) of an array that come out in pieces cut at ``places``."""

    array: np.ndarray
    weights: np.ndarray | None
    start: int
    stop: int
    places: Sequence[float] = ()

    needs = ()
    omits_nan = False

    @property
    def n_features(self) -> int:
        return self.array.shape[1]

    def opened(self, values: Sequence[object]) -> CutBlock:
        return self

    def pieces(self) -> Iterator[Piece]:
        for first, last in cut_at(self.stop - self.start, self.places):
            part = slice(self.start + first, self.start + last)
            yield Piece(self.array[part], None if self.weights is None else self.weights[part])

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column}"


def stats_of(
    params: MixtureParams,
    rows: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    frame: Frame | None = None,
    blocks: Sequence[float] = (),
    pieces: Sequence[float] = (),
) -> SufficientStats:
    """The statistics of rows, whose blocks and pieces are cut at these fractions."""
    weights = None if weights is None else np.asarray(weights, dtype=np.float64)
    runs = cut_at(len(rows), blocks) if len(rows) else [(0, 0)]
    cut = [CutBlock(rows, weights, start, stop, pieces) for start, stop in runs]
    return SerialExecutor().map_reduce(e_step, (prepare(params, frame or params.frame()),), cut).values[0]


def products(kind: str, z: np.ndarray) -> np.ndarray:
    """(..., q) products that a structure sums, for |z| (..., d): all, the squares, the squared length, or none."""
    i, j = np.triu_indices(z.shape[-1])
    squares = z * z
    table = {"full": z[..., i] * z[..., j], "diag": squares, "spherical": squares.sum(-1, keepdims=True)}
    return table.get(kind, squares[..., :0])


@dataclass(frozen=True, eq=False)
class Terms:
    """Sums of the absolute terms of statistics, field by field."""

    moments: np.ndarray
    common: np.ndarray
    log_likelihood: float
    weight: float


def densities(params: MixtureParams, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log joint densities (n, k) from dense matrices, and the sums of the absolute terms of each."""
    k, d = params.means.shape
    dense = params.covariance.dense(k, d)
    centred = rows[:, None, :] - params.means
    distances = np.einsum("nki,kij,nkj->nk", centred, np.linalg.inv(dense), centred)
    parts = [np.log(params.weights), -0.5 * np.linalg.slogdet(dense)[1], np.full(k, -0.5 * d * np.log(2 * np.pi))]
    return sum(parts) - 0.5 * distances, sum(np.abs(part) for part in parts) + 0.5 * distances


def responsibilities(params: MixtureParams, rows: np.ndarray) -> np.ndarray:
    joint, _ = densities(params, rows)
    resp = np.exp(joint - joint.max(axis=1, keepdims=True))
    return resp / resp.sum(axis=1, keepdims=True)


def absolute_terms(
    kind: str,
    params: MixtureParams,
    rows: np.ndarray,
    stats: SufficientStats,
    weights: np.ndarray | None = None,
    *,
    detour: np.ndarray | float = 0.0,
) -> Terms:
    """Sums of absolute terms in the coordinates of ``stats``; detour: the way (k, d) that an origin was moved."""
    weights = np.ones(len(rows)) if weights is None else weights
    resp = responsibilities(params, rows) * weights[:, None]
    z = (np.abs(rows[:, None, :] - stats.origin) + detour) * stats.scale
    features = np.concatenate([np.ones((*z.shape[:2], 1)), z, products(kind, z)], axis=2)
    moments = np.einsum("nk,nkf->kf", resp, features)
    common = np.einsum("nk,nkq->q", resp, products("full", z)) if kind == "tied" else np.empty(0)
    return Terms(moments, common, float((resp * densities(params, rows)[1]).sum()), float(weights.sum()))


def assert_same(one: SufficientStats, other: SufficientStats, terms: Terms, tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance`` of the sums of absolute terms."""
    for field in ("moments", "common", "log_likelihood", "weight"):
        error = np.abs(np.asarray(getattr(one, field)) - getattr(other, field))
        allowed = tolerance * np.asarray(getattr(terms, field))
        # responsibilities below about 1e-300 are all the same to a mixture
        assert (error <= allowed + 1e-290).all(), f"{field}: {(error / (allowed / tolerance + 1e-300)).max():.2e}"


def assert_identical(one: SufficientStats, other: SufficientStats) -> None:
    """Equal to the last bit."""
    for field in ("moments", "common", "origin", "scale"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    for field in ("log_likelihood", "weight", "n_rows", "n_skipped"):
        assert getattr(one, field) == getattr(other, field), field
