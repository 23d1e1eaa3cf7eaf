"""solver="incremental": free energy never falls, order does not matter, and where it stands still EM stands still."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import given
from hypothesis import strategies as st
from mixtures import SLOW_KINDS, UNFINISHED, blobs, given_start
from support import (
    KINDS,
    Case,
    absolute_terms,
    assert_identical,
    assert_same,
    cases,
    cut_at,
    cut_places,
    densities,
    responsibilities,
)
from support import stats_of as whole

from streamgmm import GaussianMixture, fitting, open_source
from streamgmm.checks import RULES
from streamgmm.errors import DataError, NumericalError
from streamgmm.executors import LocalExecutor, SerialExecutor
from streamgmm.executors.local import threaded_get
from streamgmm.free_energy import ExpectedLogJoint, expected_log_joint
from streamgmm.kernel import e_step_each, prepare
from streamgmm.params import MixtureParams
from streamgmm.solvers import incremental as solver
from streamgmm.solvers.em import em
from streamgmm.stats import SufficientStats

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "incremental.py"


class Blocks:
    """Rows in blocks of any sizes, read as a solver reads them."""

    def __init__(self, rows: np.ndarray, cuts: Sequence[tuple[int, int]], weights: np.ndarray | None = None) -> None:
        source = open_source(rows)
        self.weights = weights
        self.parts = [source.block(*cut) for cut in cuts]
        self.frame: Any = None

    def __len__(self) -> int:
        return len(self.parts)

    def read(self, params: MixtureParams, numbers: Sequence[int]) -> tuple[SufficientStats, ...]:
        self.frame = self.frame or params.frame()
        chosen = [self.parts[number] for number in numbers]
        return SerialExecutor().map_reduce(e_step_each, prepare(params, self.frame), chosen).values

    def memorised(self, params: MixtureParams) -> tuple[solver.Memory, list[Any]]:
        kept: list[Any] = [None] * len(self)
        return solver.memorised(self.read, kept, params, 0.0), kept

    def solved(self, params: MixtureParams, *, seed: int = 0, tol: float = 1e-13, max_iter: int = 2_000) -> Any:
        return solver.incremental(
            self.read,
            [params],
            make_caches=lambda: [None] * len(self),
            seed=seed,
            tol=tol,
            max_iter=max_iter,
            reg_covar=0.0,
            report=lambda record: None,
        )


def evenly(n: int, n_blocks: int) -> list[tuple[int, int]]:
    return cut_at(n, [i / n_blocks for i in range(n_blocks)])


def mean_log_likelihood(params: MixtureParams, rows: np.ndarray) -> float:
    return whole(params, rows).log_likelihood / len(rows)


# -- the expected complete log-likelihood --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), other=st.integers(0, 99))
def test_expected_log_joint_is_that_of_every_row(kind: str, case: Case, other: int) -> None:
    """Responsibilities times log densities, row by row, at other parameters than those of the responsibilities."""
    params, rows = case.mixture(kind), case.rows()
    at = Case(case.k, case.d, case.n, other, case.offset).mixture(kind)
    resp, (joint, terms) = responsibilities(params, rows), densities(at, rows)
    found = expected_log_joint(whole(params, rows), at)
    limit = 1e-9 if case.offset else 1e-11  # moments about the origin lose the square of the offset
    assert found == pytest.approx((resp * joint).sum(), abs=limit * (resp * terms).sum())


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), places=cut_places)
def test_it_is_linear_in_the_statistics(kind: str, case: Case, places: list[float]) -> None:
    params, rows = case.mixture(kind), case.rows()
    expected = ExpectedLogJoint.of(case.start(kind), params.frame().scale)
    parts = [whole(params, rows[first:last], frame=params.frame()) for first, last in cut_at(case.n, places)]
    size = sum(abs(expected(part)) for part in parts)
    assert expected(reduce(add, parts)) == pytest.approx(sum(map(expected, parts)), abs=1e-9 * size)
    assert expected(2.5 * parts[0]) == pytest.approx(2.5 * expected(parts[0]), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases())
def test_log_likelihood_less_it_is_the_entropy(kind: str, case: Case) -> None:
    params, rows = case.mixture(kind), case.rows()
    stats, resp = whole(params, rows), responsibilities(params, rows)
    entropy = -(resp * np.log(np.maximum(resp, 1e-300))).sum()
    size = (resp * densities(params, rows)[1]).sum()
    limit = 1e-9 if case.offset else 1e-11
    assert ExpectedLogJoint.of(params, stats.scale).entropy(stats) == pytest.approx(entropy, abs=limit * size)


def test_a_component_without_weight_adds_nothing() -> None:
    params = Case(3, 2, 50, 0).mixture("full")
    without = MixtureParams(np.array([0.4, 0.6, 0.0]), params.means, params.covariance)
    assert np.isfinite(expected_log_joint(whole(without, Case(3, 2, 50, 0).rows()), without))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_less_others_are_those_of_the_rest(kind: str) -> None:
    case = Case(3, 4, 80, 1)
    params, rows = case.mixture(kind), case.rows()
    frame = params.frame()
    rest = whole(params, rows, frame=frame) - whole(params, rows[:30], frame=frame)
    alone = whole(params, rows[30:], frame=frame)
    assert_same(rest, alone, absolute_terms(kind, params, rows, alone))
    assert (rest.n_rows, rest.weight) == (50, 50.0)
    with pytest.raises(DataError, match="different coordinates"):
        _ = rest - whole(case.start(kind), rows)


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases((30, 200)), places=cut_places)
def test_free_energy_never_falls_and_is_a_lower_bound(kind: str, case: Case, places: list[float]) -> None:
    """After every visit of every block, not only after passes."""
    rows = case.rows()
    blocks = Blocks(rows, cut_at(case.n, places))
    try:
        memory, kept = blocks.memorised(case.start(kind))
        before = mean_log_likelihood(case.start(kind), rows)
        noise = 1e-7 if case.offset else 1e-9
        for number in np.random.default_rng(case.seed).integers(len(blocks), size=20).tolist():
            assert memory.free_energy >= before - noise
            assert memory.free_energy <= mean_log_likelihood(memory.params, rows) + noise
            before = memory.free_energy
            memory = memory.visited(blocks.read, kept, [number], 0.0)
    except NumericalError:
        return  # a component without reg_covar may collapse onto a row, as it may in EM


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases((30, 200)), places=cut_places)
def test_caches_sum_to_the_statistics_of_all_rows(kind: str, case: Case, places: list[float]) -> None:
    params, rows = case.start(kind), case.rows()
    blocks = Blocks(rows, cut_at(case.n, places))
    try:
        _, kept = blocks.memorised(params)
    except NumericalError:
        return
    stats = whole(params, rows).about(params.means, kept[0].scale)
    total = solver.total_of(kept, params.means, kept[0].scale)
    terms = absolute_terms(kind, params, rows, stats, detour=np.abs(params.frame().shift - params.means))
    assert_same(total, stats, terms, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_taking_back_and_learning_again_leaves_the_same(kind: str) -> None:
    """After a visit of one changed block at the parameters of the caches they are those of the rows as they are now."""
    case = Case(3, 3, 120, 3)
    rows, params = case.rows(), case.start(kind)
    cuts = evenly(120, 6)
    _, kept = Blocks(rows, cuts).memorised(params)
    other = rows.copy()
    other[slice(*cuts[2])] = Case(3, 3, 120, 4).rows()[:20]
    scale = kept[0].scale
    memory = solver.Memory(params, solver.total_of(kept, params.means, scale), np.zeros(6))
    changed = Blocks(other, cuts)
    changed.frame = params.frame()
    after = memory.visited(changed.read, kept, [2], 0.0)
    wanted = whole(params, other, frame=changed.frame).about(params.means, scale)
    assert_same(after.total, wanted, absolute_terms(kind, params, other, wanted), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_is_textbook_em(kind: str) -> None:
    case = Case(3, 3, 300, 5)
    rows, start = case.rows(), case.start(kind)
    blocks = Blocks(rows, [(0, 300)])
    found = blocks.solved(start, tol=0.0, max_iter=12)

    def read(models: tuple[MixtureParams, ...]) -> tuple[SufficientStats, ...]:
        return tuple(blocks.read(model, [0])[0] for model in models)

    wanted = em(read, [start], tol=0.0, max_iter=12, reg_covar=0.0, report=lambda record: None)
    for one, other in [
        (found.params.weights, wanted.params.weights),
        (found.params.means, wanted.params.means),
        (found.params.covariance.values, wanted.params.covariance.values),
    ]:
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def distance(one: MixtureParams, other: MixtureParams) -> float:
    pairs = [(one.weights, other.weights), (one.means, other.means), (one.covariance.values, other.covariance.values)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_any_order_of_rows_and_blocks_ends_at_the_optimum_of_em(kind: str) -> None:
    """Sorted or not, in any order of visits, in one block, 13 or 45: where EM ends from the same start."""
    rng = np.random.default_rng(7)
    labels = np.sort(rng.integers(3, size=900))
    centres = np.array([[0.0, 0.0], [4.0, 1.0], [-2.0, 4.0]])
    rows = centres[labels] + rng.standard_normal((900, 2))
    start = MixtureParams(
        np.full(3, 1 / 3),
        centres + 0.7,
        Case(3, 2, 1, 0).mixture(kind).covariance.from_dense(np.stack([np.eye(2)] * 3)),
    )
    wanted = Blocks(rows, [(0, 900)]).solved(start)
    assert wanted.converged
    shuffled = rows[rng.permutation(900)]
    for given_rows, n_blocks, seed in [(rows, 13, 0), (rows, 13, 1), (shuffled, 13, 0), (rows[::-1], 45, 2)]:
        found = Blocks(np.ascontiguousarray(given_rows), evenly(900, n_blocks)).solved(start, seed=seed)
        assert found.converged
        assert distance(found.params, wanted.params) < 1e-6
        assert found.lower_bound == pytest.approx(mean_log_likelihood(found.params, rows), abs=1e-9)


def test_a_group_is_a_function_of_the_number_of_blocks() -> None:
    assert [solver.group_size(n) for n in (1, 39, 40, 41, 80, 81, 4_000)] == [1, 1, 1, 2, 2, 3, 100]
    order = np.random.default_rng(0).permutation(95)
    made = list(solver.groups(order))
    assert sorted(chain(*made)) == list(range(95))
    assert all(group == sorted(group) and len(group) <= 3 for group in made)
    assert len(made) <= solver.MOST_STEPS


# -- as a solver of fit --------------------------------------------------------------------------------------------


def fit(rows: Any, block_rows: int | None = 60, *, weights: Any = None, **settings: Any) -> GaussianMixture:
    chosen = {"n_components": 3, "solver": "incremental", "random_state": 0, **settings}
    source = open_source(rows, block_rows=block_rows) if isinstance(rows, np.ndarray) else rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GaussianMixture(**chosen).fit(source, sample_weight=weights)


def test_every_solver_has_a_rule() -> None:
    assert all(RULES["solver"].holds(name) for name in fitting.SOLVERS)
    assert re.findall(r"'(\w+)'", RULES["solver"].words) == list(fitting.SOLVERS)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_lower_bounds_rise_to_the_log_likelihood(kind: str) -> None:
    rows = blobs()
    model = fit(rows, covariance_type=kind, reg_covar=0.0, tol=1e-10, max_iter=3_000, **given_start(kind))
    assert model.converged_
    assert (np.diff(model.lower_bounds_) > -1e-12).all()
    assert model.lower_bound_ == pytest.approx(model.score(rows), abs=1e-7)
    assert model.lower_bound_ <= model.score(rows) + 1e-12
    assert model.n_passes_ == model.n_iter_ + 1
    textbook = fit(rows, None, covariance_type=kind, reg_covar=0.0, tol=1e-12, max_iter=9_000, solver="em")
    if kind == "full":
        assert model.score(rows) == pytest.approx(textbook.score(rows), abs=1e-4)


@pytest.mark.parametrize("scheduler", [("threads", 3), ("synchronous", 1), ("processes", 2)], ids=lambda s: s[0])
def test_same_bits_wherever_blocks_run(scheduler: tuple[str, int], tmp_path: Path) -> None:
    """90 blocks in groups of three, the last one ragged; the blocks of a store."""
    rows = blobs(90 * 40 - 13)
    store = write_zarr(tmp_path, rows, 40)
    runs = []
    for name, workers in (("synchronous", 1), scheduler):
        with dask.config.set(scheduler=name, num_workers=workers):
            runs.append(fit(open_source(store, block_rows=40), tol=0.0, max_iter=3))
    for name in ("weights_", "means_", "covariances_", "lower_bounds_"):
        np.testing.assert_array_equal(getattr(runs[0], name), getattr(runs[1], name), err_msg=name)


def test_blocks_read_the_same_on_every_executor() -> None:
    """The statistics of each of 90 blocks, in their order, as the serial executor leaves them."""
    source, params = open_source(blobs(90 * 40 - 13), block_rows=40), Case(3, 3, 1, 0).mixture("full")
    numbers = np.random.default_rng(0).permutation(90).tolist()
    wanted = fitting.Rows(source, SerialExecutor(), params.frame()).read_blocks(params, numbers)
    for get, n in ((dask.get, 1), (threaded_get, 3)):
        found = fitting.Rows(source, LocalExecutor(get, n), params.frame()).read_blocks(params, numbers)
        for one, other in zip(found, wanted, strict=True):
            assert_identical(one, other)
    assert [stats.n_rows for stats in wanted] == [27 if number == 89 else 40 for number in numbers]


def test_starts_run_one_after_the_other_and_the_best_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        model = fit(blobs(), n_init=3, init_params="random", max_iter=20, tol=1e-4)
    passes = [re.match(r"pass +(\d+)  start (\d)  free energy/row +(\S+)", line) for line in caplog.messages]
    told = [(int(found[2]), float(found[3])) for found in passes if found]
    assert [start for start, _ in told] == sorted(start for start, _ in told)
    assert len(told) == model.n_passes_ - 1
    last = dict(told)
    assert set(last) == {0, 1, 2}
    assert model.lower_bound_ == pytest.approx(max(last.values()), abs=1e-6)


def test_statistics_go_on_into_partial_fit() -> None:
    rows = blobs()
    model = fit(rows, tol=1e-6)
    assert model.effective_rows_ == pytest.approx(len(rows))
    model.partial_fit(blobs(300, seed=9))
    assert model.effective_rows_ == pytest.approx(1_500, rel=0.05)
    assert model.n_rows_ == 1_500


def test_weights_are_repetitions() -> None:
    rows, counts = blobs(600), np.random.default_rng(0).integers(0, 4, 600)
    start = given_start("full")
    weighted = fit(rows, 600, weights=counts, tol=0.0, max_iter=5, **start)
    repeated = fit(np.repeat(rows, counts, axis=0), 10_000, tol=0.0, max_iter=5, **start)
    np.testing.assert_allclose(weighted.means_, repeated.means_, atol=1e-9)


def test_without_a_pass_the_start_is_published() -> None:
    model = fit(blobs(), max_iter=0, **given_start("full"))
    np.testing.assert_array_equal(model.means_, given_start("full")["means_init"])
    assert model.lower_bounds_ == []


def test_it_warns_where_it_did_not_converge() -> None:
    with UNFINISHED:
        GaussianMixture(3, solver="incremental", max_iter=1, random_state=0).fit(blobs())


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_block_of_weight_zero_changes_nothing() -> None:
    rows, weights = blobs(600), np.ones(600)
    weights[120:180] = 0.0
    start = given_start("full")
    model = fit(rows, weights=weights, tol=0.0, max_iter=6, **start)
    assert np.isfinite(model.means_).all()
    assert (np.diff(model.lower_bounds_) > -1e-5).all()
    without = Blocks(np.delete(rows, slice(120, 180), axis=0), evenly(540, 9))
    params = MixtureParams(
        start["weights_init"], start["means_init"], model._params().covariance.from_precisions(start["precisions_init"])
    )
    bound = without.memorised(params)[0].free_energy
    assert model.lower_bounds_[0] == pytest.approx(bound, abs=1e-5)


def test_nan_leaves_the_model_as_it_was() -> None:
    model = fit(blobs())
    before = {**model.__dict__}
    rows = blobs()
    rows[700, 1] = np.nan
    with pytest.raises(DataError, match="row 700, column 1"):
        model.fit(open_source(rows, block_rows=60))
    assert model.__dict__ == before


def test_a_component_that_starves_keeps_its_mean() -> None:
    start = given_start("full")
    start["means_init"] = start["means_init"].copy()
    start["means_init"][0] = 1e4
    with pytest.warns(UserWarning, match="lost all their rows"):
        model = GaussianMixture(3, solver="incremental", random_state=0, **start).fit(
            open_source(blobs(), block_rows=60)
        )
    np.testing.assert_array_equal(model.means_[0], start["means_init"][0])
    assert model.weights_[0] >= 0.0
    assert np.isfinite(model.lower_bounds_).all()


def test_a_collapse_is_said_and_another_start_may_live() -> None:
    rows = np.repeat(np.array([[0.0, 0.0], [1.0, 1.0]]), 50, axis=0)
    with pytest.raises(NumericalError, match="not positive definite"):
        fit(rows, 10, n_components=2, reg_covar=0.0)
    assert fit(rows, 10, n_components=2, reg_covar=1e-6).converged_


# -- figures -------------------------------------------------------------------------------------------------------


def median_gap(*options: str) -> float:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], check=True, capture_output=True, text=True)
    return float(re.search(r"^median +(\S+)", done.stdout, flags=re.MULTILINE)[1])  # type: ignore[index]


def test_sorted_rows_are_near_the_optimum_after_ten_passes() -> None:
    assert median_gap("--seeds", "1", "--rows", "40000") <= 4e-3


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_sorted_rows_are_near_the_optimum_after_ten_passes_of_many_rows() -> None:
    assert median_gap() <= 4e-3
