"""From a given start it does not matter in which order rows lie: the sample is the same, and so is every step."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mixtures import KINDS, UNFINISHED, as_given, assert_identical, mixture_of
from samples import part, whole
from support import Case
from test_checkpoint import StoppedError, stopped_after

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.draw import Copies, Draw
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot, survey_block, take_pilot
from streamgmm.solvers.gain import Point
from streamgmm.solvers.rounding import rounded
from streamgmm.solvers.surrogate import Progress
from streamgmm.sources import with_weights
from streamgmm.stats import Frame
from streamgmm.streams import sample_index
from streamgmm.synthetic import recipe


def pilot_of(rows: np.ndarray, size: int, seed: int = 1, block_rows: int | None = None, weights: Any = None) -> Pilot:
    source = with_weights(open_source(rows, block_rows=block_rows), weights)
    n = source.n_rows
    return take_pilot(source, SerialExecutor(), sample_index(seed, n, size), Draw.of(seed, n, size))


def assert_same_sample(one: Pilot, other: Pilot) -> None:
    assert one.any_order
    assert other.any_order
    np.testing.assert_array_equal(one.sample, other.sample)
    np.testing.assert_array_equal(one.sample_weights, other.sample_weights)


# -- the sample ------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@example(3, 3, 3, True)
@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(1, 3), st.booleans())
def test_any_order_and_any_blocks_give_the_same_sample(seed: int, block_rows: int, copies: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.normal(size=(600, 2)), rng.normal(size=(20, 2)).repeat(copies, axis=0)])
    weights = rng.uniform(0.1, 3.0, len(rows)) if weighted else np.ones(len(rows))
    order = rng.permutation(len(rows))
    one = pilot_of(rows, 300, weights=weights)
    assert_same_sample(one, pilot_of(rows[order], 300, block_rows=block_rows, weights=weights[order]))


def hostile_rows(name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    n = 40_000
    return {
        "normal": rng.normal(size=(n, 3)),
        "one feature": rng.normal(size=(n, 1)),
        "single precision": rng.normal(size=(n, 2)).astype(np.float32).astype(np.float64),
        "whole numbers in an order": np.stack([np.arange(n) + 1e6, np.full(n, 3.0)], axis=1),
        "a grid": np.stack(np.divmod(np.arange(n), 200), axis=1) + 1024.0,
        "nearly alike": 1.0 + 1e-13 * rng.integers(0, 2**13, (n, 4)),
        "opposite signs": rng.choice([-1.0, 1.0], (n, 1)) * (1.0 + np.arange(n)[:, None]),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["normal", "one feature", "single precision", "whole numbers in an order", "a grid", "nearly alike",
     "opposite signs"],
)  # fmt: skip
def test_the_keys_of_rows_are_uniform_and_do_not_hang_together(name: str) -> None:
    """In 64 cells by the key of a row and, where there is one, that of its neighbour in the order of the rows."""
    keys = Draw.of(3, 10, 1).keys(np.ascontiguousarray(hostile_rows(name).T))
    cells = np.bincount((keys >> np.uint64(58)).astype(int), minlength=64)
    pairs = np.bincount(((keys[1:] >> np.uint64(61)) * 8 + (keys[:-1] >> np.uint64(61))).astype(int), minlength=64)
    for counts in (cells, pairs):
        expected = counts.sum() / 64
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < 63 + 5 * np.sqrt(2 * 63)


def test_every_row_is_as_likely_as_any_other() -> None:
    """Zeros, infinitesimal and huge values too: over 2,000 seeds each of them is drawn a fifth of the time."""
    rows = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [5e-324, 0.0], [1e300, -1e300], [3.0, 3.0]])
    x = np.ascontiguousarray(rows.T)
    draws = [Draw.of(seed, 5, 1) for seed in range(2_000)]
    shares = np.mean([draw.keys(x) < np.uint64(draw.limit) for draw in draws], axis=0)
    np.testing.assert_allclose(shares, 0.2, atol=4 * np.sqrt(0.16 / 2_000))


def test_another_seed_draws_other_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(5_000, 2))
    one, other = (pilot_of(rows, 500, seed).sample for seed in (1, 2))
    both = {tuple(row) for row in one} & {tuple(row) for row in other}
    assert len(both) < 100  # 50 by chance


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 1.0, 2.0, 4.0, 8.0], [0.5, -0.5, 3.0]])
def test_rows_of_few_values_are_drawn_one_by_one(values: list[float]) -> None:
    """How many of all combinations of these values are drawn varies as it does by chance, seed by seed."""
    x = np.array(list(product(values, repeat=5))).T
    draws = [Draw.of(seed, 5, 1) for seed in range(1_000)]
    counts = [len(draw.drawn(draw.keys(np.ascontiguousarray(x)))) for draw in draws]
    assert 0.8 < np.var(counts) / (0.2 * 0.8 * x.shape[1]) < 1.2


def test_negative_zero_is_zero() -> None:
    rows = np.random.default_rng(0).normal(size=(3_000, 2))
    rows[:, 0] = 0.0
    one, other = pilot_of(rows, 500), pilot_of(rows * [-1.0, 1.0], 500)
    assert_same_sample(one, other)
    assert not np.signbit(other.sample[:, 0]).any()


def test_copies_are_drawn_together_and_count_as_often() -> None:
    rows = np.random.default_rng(1).normal(size=(3_000, 2))
    some = rows[:60]
    pilot = pilot_of(np.concatenate([rows, some]), 1_000)
    assert pilot.any_order
    twice = {tuple(row) for row in some}
    for row, weight in zip(pilot.sample, pilot.sample_weights, strict=True):
        assert weight == (2.0 if tuple(row) in twice else 1.0)
    assert 0 < (pilot.sample_weights == 2.0).sum() < 60


def test_rows_that_do_not_count_are_not_drawn() -> None:
    rows = np.random.default_rng(1).normal(size=(4_000, 2))
    weights = np.arange(4_000) % 4
    pilot = pilot_of(rows, 1_000, weights=weights)
    counting = {tuple(row): weight for row, weight in zip(rows, weights, strict=True) if weight}
    assert [counting[tuple(row)] for row in pilot.sample] == list(pilot.sample_weights)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_where_one_row_is_many_the_sample_is_by_number(share: float) -> None:
    """Such a row would be in the sample with all of its copies or not at all."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(20_000, 2))
    rows[rng.random(20_000) < share] = [0.25, 4.0]
    for seed in range(6):
        pilot = pilot_of(rows, 2_000, seed, block_rows=3_000)
        assert not pilot.any_order
        np.testing.assert_array_equal(pilot.sample, rows[sample_index(seed, 20_000, 2_000)])
        assert (pilot.sample_weights == 1.0).all()


@pytest.mark.parametrize("rows", ["twenty-five values", "each three times"])
def test_where_all_rows_are_many_the_sample_is_by_number(rows: str) -> None:
    """Each three times, as many rows are drawn as by number, but only a third of them tell something new."""
    rng = np.random.default_rng(3)
    few = rng.integers(0, 5, (21_000, 2)).astype(float)
    thrice = rng.normal(size=(7_000, 2)).repeat(3, axis=0)
    for seed in range(6):
        assert not pilot_of(few if rows == "twenty-five values" else thrice, 2_000, seed).any_order


def drawn(rows: Any, keys: Any, weights: Any) -> Copies:
    return Copies(np.array(rows), np.array(keys, dtype=np.uint64), np.array(weights), np.ones(len(keys)))


def test_copies_are_added_up_in_one_order() -> None:
    """Three weights whose sum depends on its order, and rows that share a key and are not the same."""
    one, two = [[3.0, 1.0], [6.0, 1.0], [3.0, 1.0]], [[3.0, 1.0], [-1.0, 2.0]]
    parts = [drawn(one, [7, 7, 7], [0.1, 5.0, 0.2]), drawn(two, [7, 2], [0.3, 1.0])]
    joined, other = Copies.joined(parts, 2), Copies.joined(parts[::-1], 2)
    np.testing.assert_array_equal(joined.rows, [[-1.0, 2.0], [3.0, 1.0], [6.0, 1.0]])
    np.testing.assert_allclose(joined.weights, [1.0, 0.6, 5.0])
    np.testing.assert_array_equal(joined.numbers, [1, 3, 1])
    np.testing.assert_array_equal(joined.keys, [2, 7, 7])
    for name in ("rows", "weights", "numbers", "keys"):
        np.testing.assert_array_equal(getattr(other, name), getattr(joined, name))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_copies_in_a_block_leave_one_row_and_take_no_memory(share: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400_000, 2))
    rows[rng.random(len(rows)) < share] = 1.5
    often = np.array([[1.5], [1.5]])
    draw = next(draw for draw in (Draw.of(seed, 100, 1) for seed in range(10_000)) if len(draw.drawn(draw.keys(often))))
    (block,) = open_source(rows, block_rows=400_000).blocks()
    tracemalloc.start()
    try:
        survey = survey_block((np.arange(0), draw), block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (copies,) = survey.copies
    is_often = (copies.rows == 1.5).all(axis=1)
    np.testing.assert_array_equal(copies.numbers[is_often], [(rows == 1.5).all(axis=1).sum()])
    assert (copies.numbers[~is_often] == 1).all()
    assert peak < rows.nbytes / 4


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_a_row_of_many_copies_is_not_missed(share: float) -> None:
    """Whether it is drawn by what it holds, with all its copies, or is not."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(100_000, 2))
    rows[rng.random(len(rows)) < share] = 0.0
    for seed in range(6):
        pilot = pilot_of(rows, 10_000, seed)
        assert not pilot.any_order
        assert (pilot.sample == 0.0).all(axis=1).mean() == pytest.approx(share, abs=0.01)


# -- what is told of all rows ----------------------------------------------------------------------------------------


def point_at(params: MixtureParams, rows: np.ndarray) -> Point:
    frame = Frame(np.zeros(rows.shape[1]), np.full(rows.shape[1], 0.5))
    block = open_source(rows).blocks()[0]
    return Point.of(params, e_step((prepare(params, frame),), block).values[0])


def point_at_sample(rows: np.ndarray, params: MixtureParams) -> Point:
    return Point.of(params, whole(rows).read(params))


def assert_same_digits(one: Point, other: Point) -> None:
    assert one.log_likelihood == other.log_likelihood
    for name in ("moments", "common"):
        np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-4, 1e-8])
def test_the_order_of_rows_does_not_reach_the_digits_that_are_kept(kind: str, tol: float) -> None:
    case = Case(3, 4, 3_000, 8)
    params, rows = case.mixture(kind), case.rows()
    one, other = point_at(params, rows), point_at(params, rows[np.random.default_rng(0).permutation(len(rows))])
    assert one.log_likelihood != other.log_likelihood or (one.stats.moments != other.stats.moments).any()
    assert_same_digits(rounded(one, tol, 0.0), rounded(other, tol, 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_does_not_matter_beside_tol(kind: str) -> None:
    """EM's own step and its gain are those of all digits to much less than ``tol``."""
    case = Case(3, 4, 3_000, 8)
    point = point_at(case.mixture(kind), case.rows())
    for tol in (1e-2, 1e-5, 1e-10, 1e9):
        found = rounded(point, tol, 0.0)
        assert abs(found.log_likelihood - point.log_likelihood) <= 0.01 * min(tol, 1.0)
        assert found.stats.log_likelihood == point.log_likelihood
        step, other, tol = point.em_step(0.0), found.em_step(0.0), min(tol, 1.0)
        np.testing.assert_allclose(other.weights, step.weights, rtol=1e-3 * np.sqrt(tol))
        np.testing.assert_allclose(other.means, step.means, atol=1e-2 * np.sqrt(tol))
        np.testing.assert_allclose(other.covariance.values, step.covariance.values, atol=1e-2 * np.sqrt(tol))


@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("deviation", [1e-3, 1e-5])
def test_features_that_nearly_determine_each_other_stay_positive_definite(kind: str, deviation: float) -> None:
    """Digits are left out in the deviations of a component in its own axes, however thin it is."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5_000, 2))
    rows[:, 1] = rows[:, 0] + deviation * rows[:, 1]
    params = mixture_of(rows, (rows[:, 0] > 0).astype(int), kind)
    point = point_at(params, rows)
    step, other = (of.em_step(0.0).covariance.root(2, 2) for of in (point, rounded(point, 1e-6, 0.0)))
    np.testing.assert_allclose(other.precision_diagonal, step.precision_diagonal, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
def test_rows_that_are_much_thinner_or_wider_than_a_component(kind: str, size: float) -> None:
    """Digits are left out in the deviations of what EM's step makes of the rows, whatever it started from."""
    case = Case(2, 3, 3_000, 8)
    rows = case.rows() * [size, size, 1.0]
    point = point_at(case.mixture(kind), rows)
    step, other = (of.em_step(0.0).covariance for of in (point, rounded(point, 1e-3, 0.0)))
    np.testing.assert_allclose(other.variances(2, 3), step.variances(2, 3), rtol=1e-3)
    assert_same_digits(rounded(point, 1e-3, 0.0), rounded(point_at(case.mixture(kind), rows[::-1]), 1e-3, 0.0))


def test_where_em_s_step_degenerates_nothing_is_left_out() -> None:
    case = Case(2, 2, 500, 8)
    point = point_at(case.mixture("full"), np.tile(case.mixture("full").means[:1], (500, 1)))
    assert rounded(point, 1e-6, 0.0) is point
    assert rounded(point, 1e-6, 1e-6) is not point


@pytest.mark.parametrize("tol", [1e-306, 1e-20])
def test_where_tol_is_finer_than_every_digit_all_are_kept(tol: float) -> None:
    case = Case(2, 2, 500, 8)
    point = point_at(case.mixture("full"), case.rows())
    found = rounded(point, tol, 0.0)
    assert found.log_likelihood == point.log_likelihood
    np.testing.assert_allclose(found.stats.moments, point.stats.moments, rtol=1e-12, atol=1e-14)


def test_a_component_without_rows_stays_one() -> None:
    case = Case(2, 2, 500, 8)
    point = point_at(case.mixture("full"), case.rows())
    moments = point.stats.moments.copy()
    moments[0] = 0.0
    found = rounded(replace(point, stats=replace(point.stats, moments=moments)), 1e-6, 0.0)
    np.testing.assert_array_equal(found.stats.moments[0], 0.0)


# -- fits ------------------------------------------------------------------------------------------------------------


def overlapping(seed: int = 19) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows in random order, and a start that is the optimum of none of them."""
    rows, labels = recipe(4, 3, 20_000, 1.0, seed)
    return rows, as_given(mixture_of(rows, labels, "full"))


@pytest.mark.parametrize("tol", [None, 1e-8])
def test_sorted_and_shuffled_rows_give_the_same_bits(tol: float | None, tmp_path: Any) -> None:
    shuffled, start = overlapping()
    in_order = shuffled[np.argsort(shuffled[:, 0], kind="stable")]
    model = GaussianMixture(4, sample_rows=4_000, tol=tol, max_iter=200, random_state=0, **start)
    one = model.fit(write_zarr(tmp_path, in_order, 1_000))
    assert one.n_passes_ > 2
    other = GaussianMixture(**{**model.get_params(), "covariance_type": "full"}).fit(shuffled)
    assert_identical(one, other)
    np.testing.assert_allclose(one.lower_bounds_, other.lower_bounds_, rtol=1e-13)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_other_structures_and_weights_too(kind: str) -> None:
    rows, labels = recipe(3, 2, 20_000, 1.5, 4)
    weights = np.random.default_rng(0).integers(1, 3, len(rows)).astype(float)
    model = GaussianMixture(
        3, covariance_type=kind, sample_rows=3_000, random_state=0, **as_given(mixture_of(rows, labels, kind))
    )
    order = np.argsort(rows[:, 1], kind="stable")
    one = model.fit(rows, sample_weight=weights)
    other = GaussianMixture(**model.get_params()).fit(rows[order], sample_weight=weights[order])
    assert one.n_passes_ > 2
    assert_identical(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_much_wider_than_the_rows(kind: str) -> None:
    """It ends where EM leads to, or higher, for EM creeps while both components are alike."""
    rng = np.random.default_rng(0)
    rows = 1e-4 * (rng.normal(size=(30_000, 2)) + 5.0 * rng.integers(0, 2, (30_000, 1)))
    covariance = STRUCTURES[kind].from_dense(np.broadcast_to(np.eye(2), (2, 2, 2)), np.array([0.5, 0.5]))
    start = as_given(MixtureParams(np.array([0.5, 0.5]), np.array([[0.0, 0.0], [5e-4, 5e-4]]), covariance))
    settings = {"covariance_type": kind, "reg_covar": 0.0, "random_state": 0, **start}
    few = GaussianMixture(2, sample_rows=6_000, **settings).fit(rows)
    em = GaussianMixture(2, solver="em", tol=1e-10, max_iter=500, **settings).fit(rows)
    assert few.score(rows) > em.score(rows) - 1e-5
    assert_identical(few, GaussianMixture(2, sample_rows=6_000, **settings).fit(rows[::-1]))


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_are_all_in_the_sample_too(weighted: bool) -> None:
    rows, labels = recipe(4, 2, 5_000, 0.8, 6)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(rows)) if weighted else np.ones(len(rows))
    start = as_given(mixture_of(rows, labels, "full"))
    found = []
    for order in (np.arange(len(rows)), np.argsort(rows[:, 0], kind="stable")):
        model = GaussianMixture(4, tol=1e-8, max_iter=1_000, random_state=0, **start)
        found.append(model.fit(rows[order], sample_weight=weights[order]))
    assert found[0].n_passes_ == 1
    assert_identical(*found)


def test_a_warm_start_is_a_given_one() -> None:
    rows, start = overlapping()
    found = []
    for order in (np.arange(len(rows)), np.argsort(rows[:, 0], kind="stable")):
        model = GaussianMixture(4, sample_rows=4_000, warm_start=True, max_iter=1, random_state=0, **start)
        with UNFINISHED:
            model.fit(rows)
        found.append(model.set_params(max_iter=100).fit(rows[order]))
    assert_identical(*found)


def test_where_most_rows_are_left_out_too(tmp_path: Any) -> None:
    """A second read draws as many as it takes."""
    rows, start = overlapping()
    holes = np.full((60_000, 3), np.nan)
    holes[::3] = rows
    found = []
    for order in (np.arange(60_000), np.argsort(holes[:, 0], kind="stable")):
        model = GaussianMixture(4, sample_rows=3_000, random_state=0, **start)
        found.append(model.fit(open_source(holes[order], nan_policy="omit")))
    assert_identical(*found)


def test_with_tol_zero_every_digit_counts() -> None:
    rows, labels = recipe(4, 3, 20_000, 1.0, 19)
    start = mixture_of(rows, labels, "full")
    sample = replace(part(rows[:4_000], 20_000), any_order=True)
    stats, exact = whole(rows).read(start), point_at_sample(rows, start)
    for tol, digits in ((0.0, exact), (1e-6, rounded(exact, 1e-6, 0.0))):
        best = Progress.at(start, sample).after(stats, sample, tol, 0.0).best
        np.testing.assert_array_equal(best.stats.moments, digits.stats.moments)
        assert best.log_likelihood == digits.log_likelihood


@pytest.mark.parametrize("given", [(), ("means_init",)])
def test_where_a_start_is_sought_rows_are_drawn_by_number(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    monkeypatch.setattr("streamgmm.fitting.take_pilot", lambda *of: draws.append(of[3]) or take_pilot(*of))
    rows, start = overlapping()
    GaussianMixture(4, sample_rows=4_000, random_state=0, **{name: start[name] for name in given}).fit(rows)
    assert draws == [None]


def test_a_checkpoint_goes_on_with_the_same_sample(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, start = overlapping()
    model = GaussianMixture(4, sample_rows=4_000, tol=1e-8, random_state=0, **start)
    stopped_after(2, monkeypatch, StoppedError, lambda: model.fit(rows, checkpoint=tmp_path / "c"))
    again = model.fit(rows, checkpoint=tmp_path / "c")
    whole = GaussianMixture(**model.get_params()).fit(rows)
    assert_identical(again, whole)
    assert again.lower_bounds_ == whole.lower_bounds_


def test_the_log_likelihoods_that_are_told_have_all_their_digits() -> None:
    rows, start = overlapping()
    model = GaussianMixture(4, sample_rows=4_000, random_state=0, **start).fit(rows)
    with UNFINISHED:
        first = GaussianMixture(4, max_iter=1, solver="em", **start).fit(rows)
    assert model.lower_bounds_[0] == pytest.approx(first.lower_bounds_[0], rel=1e-14)
    assert model.history_[1].log_likelihood == model.lower_bounds_[0]


def test_the_log_says_where_the_order_matters_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    rows, start = overlapping()
    rows[::2] = np.round(rows[::2])
    with caplog.at_level("INFO", logger="streamgmm"):
        GaussianMixture(4, sample_rows=4_000, random_state=0, **start).fit(rows)
    assert "many rows are copies of each other" in caplog.text


def test_the_plan_of_a_given_start_counts_both_samples() -> None:
    """Here, where the parameters are so many that no more is kept of the sample's rows later."""
    k, d, m = 8, 8, 100_000
    rows = np.random.default_rng(0).normal(size=(150_000, d))
    start = MixtureParams(
        np.full(k, 1 / k), np.zeros((k, d)), STRUCTURES["full"](np.broadcast_to(np.eye(d), (k, d, d)))
    )
    sought, given = (GaussianMixture(k, sample_rows=m, **of).plan(rows) for of in ({}, as_given(start)))
    warm = GaussianMixture.from_parameters(start.weights, start.means, start.covariance.values)
    warm.set_params(n_components=k, sample_rows=m, warm_start=True)
    assert given.peak_bytes == warm.plan(rows).peak_bytes >= sought.peak_bytes + 2 * 8 * m * d
