"""The laws: what must hold for every mixture, every row and every way of cutting, whatever the implementation.

Tolerances are 1e-12 of the sums of absolute terms: what rounding alone may do to a sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import dask
import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from support import (
    KINDS,
    Case,
    CutBlock,
    absolute_terms,
    assert_identical,
    assert_same,
    cases,
    cut_places,
    densities,
    stats_of,
)

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import LocalExecutor, SerialExecutor, single_blas_thread
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.pilot import take_pilot
from streamgmm.stats import Frame

EPS = float(np.finfo(np.float64).eps)
SCHEDULERS = {"synchronous": dask.get, "threads": dask.threaded.get}

every_structure = pytest.mark.parametrize("kind", KINDS)

#: limits of kappa: all packed as far as the shape allows, all centred, and some of each (components, rows, or both)
kappas = st.sampled_from([1e-6 / EPS, 0.0, 150.0, 400.0])


def forms(kappa: float, tile_rows: int = 4096) -> ExitStack:
    """Move the guard's limit, and shorten tiles, so that small problems enter every branch of the kernel."""
    stack = ExitStack()
    stack.enter_context(patch("streamgmm.kernel.GUARD_LIMIT", kappa * EPS))
    stack.enter_context(patch("streamgmm.kernel.tile_rows", lambda n_moments: tile_rows))
    return stack


def fitted(
    params: MixtureParams, kind: str, X: object, *, max_iter: int = 4, sample_weight: np.ndarray | None = None
) -> GaussianMixture:
    """EM from given parameters, without regularisation, for a fixed number of passes."""
    k, d = params.means.shape
    model = GaussianMixture(
        k,
        covariance_type=kind,
        solver="em",
        tol=0,
        reg_covar=0,
        max_iter=max_iter,
        weights_init=params.weights,
        means_init=params.means,
        precisions_init=params.covariance.precisions(k, d),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, sample_weight=sample_weight)


def assert_same_fit(
    kind: str, one: GaussianMixture, other: GaussianMixture, rows: np.ndarray, tolerance: float = 1e-12
) -> None:
    """Weights, means, covariances and every lower bound, each to ``tolerance`` of the mean of its absolute terms."""
    params = MixtureParams(one.weights_, one.means_, STRUCTURES[kind](one.covariances_))
    centre = Frame(rows.mean(axis=0), np.ones(rows.shape[1]))
    stats = stats_of(params, rows, frame=centre)
    terms = absolute_terms(kind, params, rows, stats, detour=np.abs(params.means - stats.origin))
    mass = terms.moments[:, :1]
    d = rows.shape[1]
    mean_terms = terms.moments[:, 1 : 1 + d] / mass + np.abs(centre.shift) * EPS / tolerance
    dense_terms = terms.common / mass.sum() if kind == "tied" else terms.moments[:, 1 + d :] / mass
    i, j = np.triu_indices(d)
    values = {
        "full": lambda v: v[:, i, j],
        "tied": lambda v: v[i, j],
        "diag": lambda v: v,
        "spherical": lambda v: v[:, None] * d,
    }[kind]
    bound_terms = terms.log_likelihood / len(rows)
    pairs = {
        "weights": (one.weights_, other.weights_, 1.0),
        "means": (one.means_, other.means_, mean_terms),
        "covariances": (values(one.covariances_), values(other.covariances_), dense_terms),
        "lower bounds": (np.array(one.lower_bounds_), np.array(other.lower_bounds_), bound_terms),
    }
    for name, (a, b, size) in pairs.items():
        error = (np.abs(a - b) / size).max()
        assert error <= tolerance, f"{name}: {error:.2e}"


class TestChunking:
    """How rows are cut into pieces, blocks, chunks and tiles is no part of the result."""

    @every_structure
    @given(case=cases(), kappa=kappas, blocks=cut_places, pieces=cut_places, tile=st.integers(1, 70))
    def test_any_blocks_equal_one_block(
        self, kind: str, case: Case, kappa: float, blocks: list[float], pieces: list[float], tile: int
    ) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        with forms(kappa):
            whole = stats_of(params, rows, weights)
        with forms(kappa, tile):
            cut = stats_of(params, rows, weights, blocks=blocks, pieces=pieces)
        assert cut.n_rows == whole.n_rows == case.n
        assert_same(cut, whole, absolute_terms(kind, params, rows, whole, weights))

    @every_structure
    @given(case=cases(), kappa=kappas, pieces=cut_places, tile=st.integers(1, 70))
    def test_pieces_do_not_touch_a_bit(
        self, kind: str, case: Case, kappa: float, pieces: list[float], tile: int
    ) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        with forms(kappa, tile):
            whole = stats_of(params, rows, weights)
            cut = stats_of(params, rows, weights, pieces=pieces)
        assert_identical(whole, cut)

    @given(case=cases(), block_rows=st.integers(1, 70), pieces=cut_places)
    def test_the_pilot_does_not_see_blocks(self, case: Case, block_rows: int, pieces: list[float]) -> None:
        rows, weights = case.rows(), case.counts().astype(float)
        index = np.arange(0, case.n, 3)
        cut = _Cut(rows, weights, block_rows, pieces)
        whole = take_pilot(open_source(rows), SerialExecutor(), index)
        plain = take_pilot(_Cut(rows, None, block_rows, pieces), SerialExecutor(), index)
        centred = rows - rows.mean(axis=0)
        scale = np.abs(centred).T @ np.abs(centred) / case.n + np.outer(np.abs(whole.mean), np.abs(whole.mean)) * EPS
        assert (np.abs(plain.mean - whole.mean) <= 1e-12 * np.abs(rows).mean(axis=0)).all()
        assert (np.abs(plain.covariance - whole.covariance) <= 1e-12 * scale).all()
        np.testing.assert_array_equal(plain.sample, rows[index])
        weighted = take_pilot(cut, SerialExecutor(), index)
        np.testing.assert_array_equal(weighted.sample, rows[index][weights[index] > 0])
        assert (weighted.n_rows, weighted.weight) == (case.n, weights.sum())

    @every_structure
    @given(case=cases(n=(150, 300)), block_rows=st.integers(4, 90))
    def test_a_fit_in_any_blocks_equals_the_fit_in_one(self, kind: str, case: Case, block_rows: int) -> None:
        params, rows = case.start(kind), case.rows()
        whole = fitted(params, kind, open_source(rows, block_rows=case.n))
        cut = fitted(params, kind, open_source(rows, block_rows=block_rows))
        assert_same_fit(kind, whole, cut, rows)

    @every_structure
    @given(
        case=cases(n=(150, 300)),
        chunk_rows=st.integers(4, 90),
        chunks_a_shard=st.none() | st.integers(1, 4),
        block_rows=st.none() | st.integers(4, 90),
    )
    @settings(max_examples=6)
    def test_zarr_chunks_and_shards(
        self,
        kind: str,
        tmp_path_factory: pytest.TempPathFactory,
        case: Case,
        chunk_rows: int,
        chunks_a_shard: int | None,
        block_rows: int | None,
    ) -> None:
        params, rows = case.start(kind), case.rows()
        folder = tmp_path_factory.mktemp("chunks")
        shard_rows = None if chunks_a_shard is None else chunk_rows * chunks_a_shard
        path = write_zarr(Path(folder), rows, chunk_rows, shard_rows)
        stored = fitted(params, kind, open_source(path, block_rows=block_rows))
        assert_same_fit(kind, fitted(params, kind, rows), stored, rows)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A source whose pieces are cut anywhere."""

    rows: np.ndarray
    weights: np.ndarray | None
    block_rows: int
    places: list[float]
    name: str = "cut rows"
    in_memory: bool = True
    grid_rows: int = 1
    graph: Mapping[Hashable, object] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def n_features(self) -> int:
        return self.rows.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.rows.dtype

    def block(self, start: int, stop: int) -> CutBlock:
        return CutBlock(self.rows, self.weights, start, stop, self.places)

    def blocks(self) -> list[CutBlock]:
        starts = range(0, self.n_rows, self.block_rows)
        return [self.block(start, min(start + self.block_rows, self.n_rows)) for start in starts]


class TestMerge:
    """Statistics are a commutative monoid, and scalars act on it."""

    @every_structure
    @given(case=cases(), kappa=kappas, places=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def test_associative_and_commutative(
        self, kind: str, case: Case, kappa: float, places: tuple[float, float]
    ) -> None:
        params, rows = case.mixture(kind), case.rows()
        first, second = sorted(round(place * case.n) for place in places)
        with forms(kappa):
            a, b, c = (
                stats_of(params, rows[part]) for part in (slice(first), slice(first, second), slice(second, None))
            )
        left, right = (a + b) + c, a + (b + c)
        assert left.n_rows == right.n_rows == case.n
        assert_same(left, right, absolute_terms(kind, params, rows, left))
        assert_identical(a + b, b + a)

    @every_structure
    @given(case=cases(), kappa=kappas)
    def test_the_statistics_of_no_rows_are_the_zero(self, kind: str, case: Case, kappa: float) -> None:
        params, rows = case.mixture(kind), case.rows()
        with forms(kappa):
            some, none = stats_of(params, rows), stats_of(params, rows[:0])
        assert (none.n_rows, none.weight, none.log_likelihood) == (0, 0.0, 0.0)
        assert_identical(some + none, some)
        assert_identical(none + some, some)

    @every_structure
    @given(case=cases(), exponent=st.integers(-20, 20), factor=st.floats(0.01, 100.0))
    def test_scalars_scale_everything_but_the_counts(self, kind: str, case: Case, exponent: int, factor: float) -> None:
        params, rows = case.mixture(kind), case.rows()
        half = case.n // 2
        a, b = stats_of(params, rows[:half]), stats_of(params, rows[half:])
        power = 2.0**exponent
        assert_identical(power * (a + b), power * a + power * b)
        assert_identical(factor * a, a * factor)
        assert (factor * a).n_rows == a.n_rows
        assert_identical(1.0 * a, a)
        weighted = stats_of(params, rows, np.full(case.n, factor))
        terms = absolute_terms(kind, params, rows, weighted, np.full(case.n, factor))
        assert_same(factor * (a + b), weighted, terms)


class TestOrigin:
    """A change of origin or scale moves statistics exactly."""

    @every_structure
    @given(case=cases(), kappa=kappas, seed=st.integers(0, 2**32), own=st.booleans())
    def test_there_and_back(self, kind: str, case: Case, kappa: float, seed: int, own: bool) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        with forms(kappa):
            here = stats_of(params, rows, weights)
        origin, scale = _somewhere(kind, case, seed, own)
        back = here.about(origin, scale).about(here.origin, here.scale)
        detour = np.abs(here.origin - origin)
        assert_same(here, back, absolute_terms(kind, params, rows, here, weights, detour=detour))
        assert back.n_rows == here.n_rows

    @every_structure
    @given(case=cases(), kappa=kappas, seed=st.integers(0, 2**32))
    def test_moved_statistics_are_those_taken_there(self, kind: str, case: Case, kappa: float, seed: int) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        origin, scale = _somewhere(kind, case, seed, own=False)
        with forms(kappa):
            here = stats_of(params, rows, weights)
        there = stats_of(params, rows, weights, frame=Frame(origin[0], scale)).about(origin, scale)
        moved = here.about(origin, scale)
        terms = absolute_terms(kind, params, rows, moved, weights, detour=np.abs(here.origin - origin))
        assert_same(moved, there, terms)

    @every_structure
    @given(case=cases(), kappa=kappas, seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
    def test_the_way_does_not_matter(self, kind: str, case: Case, kappa: float, seeds: tuple[int, int]) -> None:
        params, rows = case.mixture(kind), case.rows()
        with forms(kappa):
            here = stats_of(params, rows)
        (by, by_scale), (to, to_scale) = (_somewhere(kind, case, seed, own=True) for seed in seeds)
        direct, around = here.about(to, to_scale), here.about(by, by_scale).about(to, to_scale)
        detour = np.abs(here.origin - by) + np.abs(by - to)
        assert_same(direct, around, absolute_terms(kind, params, rows, direct, detour=detour))


def _somewhere(kind: str, case: Case, seed: int, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """An origin (k, d), of its own for every component or one for all, and powers of two for scales."""
    rng = np.random.default_rng(seed)
    origin = 3.0 * rng.standard_normal((case.k if own else 1, case.d)) + case.offset
    scale = np.exp2(rng.integers(-6, 7, size=1 if STRUCTURES[kind].isotropic else case.d).astype(float))
    return np.broadcast_to(origin, (case.k, case.d)), np.broadcast_to(scale, (case.d,)).copy()


class TestWeights:
    """A weight says how often its row is repeated."""

    @every_structure
    @given(case=cases(), kappa=kappas, tile=st.integers(1, 70))
    def test_whole_weights_are_repetitions(self, kind: str, case: Case, kappa: float, tile: int) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        with forms(kappa, tile):
            weighted = stats_of(params, rows, weights)
            repeated = stats_of(params, np.repeat(rows, weights, axis=0))
        assert (weighted.n_rows, repeated.n_rows) == (case.n, weights.sum())
        assert_same(weighted, repeated, absolute_terms(kind, params, rows, weighted, weights))

    @every_structure
    @given(case=cases(), kappa=kappas, junk=st.sampled_from([0.0, 1.0, 1e9, -1e9]))
    def test_a_row_of_weight_zero_is_absent(self, kind: str, case: Case, kappa: float, junk: float) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        dirty = rows + junk * (weights == 0)[:, None]
        with forms(kappa):
            weighted = stats_of(params, dirty, weights)
            absent = stats_of(params, rows[weights > 0], weights[weights > 0])
        assert_same(weighted, absent, absolute_terms(kind, params, rows, weighted, weights))

    @every_structure
    @given(case=cases(), kappa=kappas)
    def test_weights_of_one_are_no_weights(self, kind: str, case: Case, kappa: float) -> None:
        params, rows = case.mixture(kind), case.rows()
        with forms(kappa):
            assert_identical(stats_of(params, rows), stats_of(params, rows, np.ones(case.n)))

    @every_structure
    @given(case=cases(n=(150, 300)), block_rows=st.integers(10, 250))
    def test_whole_fits(self, kind: str, case: Case, block_rows: int) -> None:
        params, rows, weights = case.start(kind), case.rows(), case.counts()
        repeated = np.repeat(rows, weights, axis=0)
        kept = weights > 0
        weighted = fitted(params, kind, open_source(rows, block_rows=block_rows), sample_weight=weights)
        assert_same_fit(kind, fitted(params, kind, repeated), weighted, repeated)
        absent = fitted(params, kind, rows[kept], sample_weight=weights[kept])
        assert_same_fit(kind, absent, weighted, repeated)


class TestOrder:
    """Rows are a set: their order is no part of the result."""

    @every_structure
    @given(case=cases(), kappa=kappas, seed=st.integers(0, 2**32))
    def test_statistics(self, kind: str, case: Case, kappa: float, seed: int) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts()
        order = np.random.default_rng(seed).permutation(case.n)
        with forms(kappa):
            one, other = stats_of(params, rows, weights), stats_of(params, rows[order], weights[order])
        assert_same(one, other, absolute_terms(kind, params, rows, one, weights))

    @every_structure
    @given(case=cases(n=(150, 300)), seed=st.integers(0, 2**32), block_rows=st.integers(10, 250))
    def test_whole_fits(self, kind: str, case: Case, seed: int, block_rows: int) -> None:
        params, rows = case.start(kind), case.rows()
        order = np.random.default_rng(seed).permutation(case.n)
        one = fitted(params, kind, rows)
        other = fitted(params, kind, open_source(rows[order], block_rows=block_rows))
        assert_same_fit(kind, one, other, rows)


class TestLikelihood:
    @every_structure
    @given(case=cases(n=(150, 300)), exponent=st.integers(3, 12))
    def test_never_falls(self, kind: str, case: Case, exponent: int) -> None:
        # scaled up, so that the log-likelihood stays away from zero and a part of itself means something
        rows = case.rows() * 2.0**exponent
        params = case.start(kind)
        d = case.d
        wide = MixtureParams(
            params.weights, params.means * 2.0**exponent, params.covariance.scaled(np.full(d, 2.0**exponent))
        )
        bounds = np.array(fitted(wide, kind, rows, max_iter=40).lower_bounds_)
        assert len(bounds) > 2
        assert (np.diff(bounds) >= -1e-12 * np.abs(bounds[:-1])).all(), np.diff(bounds).min()

    @every_structure
    @given(case=cases(n=(150, 300)), seed=st.integers(0, 2**32), condition=st.floats(0, 3))
    def test_shifts_with_the_volume(self, kind: str, case: Case, seed: int, condition: float) -> None:
        """z = A x + b, the start mapped along: the log-likelihood loses n log |det A| for every A that keeps shapes."""
        params, rows = case.start(kind), case.rows()
        rng = np.random.default_rng(seed)
        A, b = _map_of(kind, case.d, 10.0**condition, rng), 10.0 * rng.standard_normal(case.d)
        k, d = params.means.shape
        mapped = MixtureParams(
            params.weights,
            params.means @ A.T + b,
            STRUCTURES[kind].from_dense(A @ params.covariance.dense(k, d) @ A.T),
        )
        here = np.array(fitted(params, kind, rows, max_iter=6).lower_bounds_)
        there = np.array(fitted(mapped, kind, rows @ A.T + b, max_iter=6).lower_bounds_)
        volume = np.linalg.slogdet(A)[1]
        terms = densities(params, rows)[1].min(axis=1).mean() + abs(volume)
        assert len(here) == len(there) == 6
        assert (np.abs(there - (here - volume)) <= 1e-9 * terms).all()


def _map_of(kind: str, d: int, condition: float, rng: np.random.Generator) -> np.ndarray:
    """A matrix (d, d) that keeps the structure: singular values from 1 to 1 / condition, times a size."""
    rotation, other = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    values = np.exp(rng.uniform(-np.log(condition), 0.0, d))
    values[0], values[-1] = 1.0, 1.0 / condition
    size = 10.0 ** rng.uniform(-2, 2)
    if kind == "diag":
        return size * np.diag(rng.permutation(values) * rng.choice([-1.0, 1.0], d))
    if kind == "spherical":
        return size * rotation
    return size * rotation @ np.diag(values) @ other


class TestSameBits:
    """The serial executor is the specification: every other way to run gives its bits."""

    @pytest.mark.parametrize("blocks_per_task", [1, 8, 64])
    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    @pytest.mark.parametrize("n_blocks", [1, 2, 8, 9, 73, 131])
    @every_structure
    def test_statistics(self, kind: str, n_blocks: int, scheduler: str, blocks_per_task: int) -> None:
        case = Case(k=3, d=4, n=29 * n_blocks - 12, seed=n_blocks)
        rows, params = case.rows(), case.mixture(kind)
        blocks = open_source(rows, block_rows=29).blocks()
        assert len(blocks) == n_blocks
        assert blocks[-1].stop - blocks[-1].start == 17
        scorers = (prepare(params, params.frame()), prepare(case.mixture(kind).canonical(), params.frame()))
        with single_blas_thread():
            serial = SerialExecutor().map_reduce(e_step, scorers, blocks)
            executor = LocalExecutor(SCHEDULERS[scheduler], 3).sized(blocks_per_task)
            other = executor.map_reduce(e_step, scorers, blocks)
        for one, two in zip(serial.values, other.values, strict=True):
            assert_identical(one, two)

    def test_the_tree_is_seen_in_the_bits(self) -> None:
        """Another tree gives other bits here, so the equalities above are not empty."""
        case = Case(k=3, d=4, n=73 * 29, seed=5)
        params, rows = case.mixture("full"), case.rows()
        blocks = open_source(rows, block_rows=29).blocks()
        scorer = (prepare(params, params.frame()),)
        tree = SerialExecutor().map_reduce(e_step, scorer, blocks).values[0]
        line = e_step(scorer, blocks[0]).values[0]
        for block in blocks[1:]:
            line = line + e_step(scorer, block).values[0]
        assert not np.array_equal(tree.moments, line.moments)

    @every_structure
    def test_whole_fits(self, kind: str) -> None:
        case = Case(k=3, d=2, n=73 * 29 + 5, seed=3)
        params, rows = case.start(kind), case.rows()
        source = open_source(rows, block_rows=29)
        fits = []
        for settings_ in ({"scheduler": "synchronous"}, {"num_workers": 1}, {"num_workers": 2}, {"num_workers": 4}):
            with dask.config.set(**settings_):
                fits.append(fitted(params, kind, source))
        for other in fits[1:]:
            for name in ("weights_", "means_", "covariances_", "lower_bounds_"):
                np.testing.assert_array_equal(getattr(fits[0], name), getattr(other, name), err_msg=name)
