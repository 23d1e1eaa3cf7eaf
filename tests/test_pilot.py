"""The read before fitting: moments to rounding, a uniform sample by row number, and a name for what is wrong."""

from __future__ import annotations

import dask
import dask.threaded
import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import given
from hypothesis import strategies as st

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, NumericalError
from streamgmm.executors import LocalExecutor, SerialExecutor
from streamgmm.pilot import Pilot, survey_block, take_pilot
from streamgmm.sources import with_weights
from streamgmm.streams import sample_index


def pilot_of(rows, block_rows=None, index=None, weights=None, executor=None) -> Pilot:
    source = with_weights(open_source(rows, block_rows=block_rows), weights)
    index = np.arange(source.n_rows) if index is None else index
    return take_pilot(source, executor or SerialExecutor(), index)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(size=(5_003, 3)) @ rng.normal(size=(3, 3))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1.7e9, 1e12])
@pytest.mark.parametrize("block_rows", [1, 100, 1_024, 10_000])
def test_moments_of_the_rows_whatever_their_offset(rows, offset, block_rows):
    shifted = rows[:1_200] + offset
    pilot = pilot_of(shifted, block_rows)
    exact = shifted - offset  # without rounding: the offset has swallowed the digits already
    assert pilot.n_rows == pilot.weight == 1_200
    np.testing.assert_allclose(pilot.mean, offset + exact.mean(axis=0), rtol=4e-16, atol=1e-13)
    rounded_mean = np.spacing(offset) ** 2  # the mean itself is no better than a unit in its last place
    np.testing.assert_allclose(pilot.covariance, np.cov(exact.T, bias=True), rtol=1e-12, atol=1e-12 + rounded_mean)


def test_integer_weights_are_repetitions(rows):
    rows, counts = rows[:500], np.random.default_rng(0).integers(0, 4, size=500)
    weighted, repeated = pilot_of(rows, 64, weights=counts), pilot_of(np.repeat(rows, counts, axis=0), 64)
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-12)
    assert weighted.weight == repeated.weight == counts.sum()
    assert weighted.n_rows == 500


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31))
def test_any_blocks_give_the_same_moments_and_sample(n, block_rows, seed):
    rng = np.random.default_rng(seed)
    rows = 1e5 + rng.normal(size=(n, 2)) * [1e-3, 1e3]
    index = sample_index(seed, n, 17)
    one, many = pilot_of(rows, n, index), pilot_of(rows, block_rows, index)
    np.testing.assert_allclose(many.mean, one.mean, rtol=1e-14)
    np.testing.assert_allclose(many.covariance, one.covariance, rtol=1e-9, atol=1e-9 * np.diag(one.covariance).min())
    assert np.array_equal(one.sample, rows[index])
    assert np.array_equal(many.sample, rows[index])


@pytest.mark.parametrize("chunk_rows", [13, 100, 4_000])
def test_the_sample_is_chosen_by_row_number(tmp_path, rows, chunk_rows):
    index = sample_index(7, len(rows), 250)
    with dask.config.set(num_workers=3):
        executor = LocalExecutor(dask.threaded.get, 3)
        pilot = pilot_of(write_zarr(tmp_path, rows, chunk_rows), 700, index, executor=executor)
    assert np.array_equal(pilot.sample, rows[index])
    assert np.array_equal(pilot.sample_weights, np.ones(250))


def test_sampled_rows_bring_their_weights_and_rows_without_weight_stay_out(rows):
    weights = np.arange(len(rows)) % 3.0
    index = sample_index(7, len(rows), 250)
    pilot = pilot_of(rows, 700, index, weights)
    counted = index[weights[index] > 0]
    assert np.array_equal(pilot.sample, rows[counted])
    assert np.array_equal(pilot.sample_weights, weights[counted])


def test_a_row_without_weight_may_be_huge(rows):
    spoiled, weights = rows[:100].copy(), np.ones(100)
    spoiled[5] = 1e300
    weights[5] = 0.0
    found, expected = pilot_of(spoiled, weights=weights), pilot_of(np.delete(spoiled, 5, axis=0))
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)


@pytest.mark.parametrize("n_weighted", [5, 40])
def test_few_rows_with_weight_among_many_can_be_learned(n_weighted):
    """The sample is drawn by row number; where weights are rare it must still find rows that count."""
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(400_000, 2)), np.zeros(400_000)
    weights[rng.choice(len(rows), n_weighted, replace=False)] = 1.0
    model = GaussianMixture(1, random_state=0).fit(rows, sample_weight=weights)
    np.testing.assert_allclose(model.means_[0], rows[weights > 0].mean(axis=0), atol=1e-12)


def test_the_sample_is_uniform():
    """Every row is as likely as any other: counts over 2,000 seeds are binomial, within five deviations."""
    counts = np.bincount(np.concatenate([sample_index(seed, 40, 10) for seed in range(2_000)]), minlength=40)
    deviation = np.sqrt(2_000 * 0.25 * 0.75)
    assert abs(counts - 500.0).max() < 5 * deviation
    assert 0.5 < counts.std() / deviation < 1.5


@given(st.integers(0, 2**128 - 1), st.integers(1, 500), st.integers(1, 600))
def test_sample_index_rises_without_repetition(seed, n, size):
    index = sample_index(seed, n, size)
    assert len(index) == min(n, size)
    assert (np.diff(index) > 0).all()
    assert index[0] >= 0
    assert index[-1] < n
    assert np.array_equal(index, sample_index(seed, n, size))


def test_the_frame_has_powers_of_two_and_unit_deviations(rows):
    scaled = rows * [1.0, 1e-6, 1e9] + [0.0, 1.0, 1e12]
    pilot = pilot_of(scaled)
    frame = pilot.frame(isotropic=False)
    deviations = scaled.std(axis=0) * frame.scale
    assert ((deviations >= 0.5) & (deviations < 1.0)).all()
    assert (np.frexp(frame.scale)[0] == 0.5).all()
    assert len(set(pilot.frame(isotropic=True).scale)) == 1
    assert np.array_equal(frame.shift, np.median(scaled, axis=0))


@pytest.mark.parametrize("size", [1e6, 1e12, 1e100])
def test_one_far_row_does_not_move_the_frame(rows, size):
    """Else all components lie far from the origin in their own deviations, and all of them take the centred form."""
    far = np.concatenate([rows, np.full((1, rows.shape[1]), size)])
    frame, spoilt = (
        take_pilot(open_source(x), SerialExecutor(), np.arange(4_000)).frame(isotropic=False) for x in (rows, far)
    )
    assert np.array_equal(frame.shift, spoilt.shift)
    assert np.array_equal(frame.scale, spoilt.scale)


def test_what_blocks_leave_behind_does_not_grow_with_their_rows():
    """A sample of a few rows out of many tiles: only tiles that hold one of them may leave something."""
    rows = np.random.default_rng(0).normal(size=(400_000, 1))
    (block,) = open_source(rows, block_rows=len(rows)).blocks()
    assert len(survey_block((np.array([3, 5, 399_999]), None), block).sample) <= 3


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize("row", [0, 1_023, 1_024, 3_333, 5_002])
def test_values_that_are_not_finite_are_named(tmp_path, rows, row, value, words):
    spoiled = rows.copy()
    spoiled[row, 2] = value
    path = write_zarr(tmp_path, spoiled, 500)
    with pytest.raises(DataError, match=rf"contains {words} in row {row}, column 2 \(chunk {row // 500}/0 of rows.zar"):
        pilot_of(path, 2_000)


def test_the_first_of_several_is_named(rows):
    spoiled = rows.copy()
    spoiled[[77, 77, 78], [2, 1, 0]] = np.nan, np.inf, np.nan
    with pytest.raises(DataError, match="contains infinity in row 77, column 1"):
        pilot_of(spoiled, 50)


def test_tiles_of_very_different_spread_are_merged_without_overflow(rows):
    """The first tile asks for a scale of 2^500, in which the squares of the next one would overflow."""
    mixed = np.concatenate([rows[:1_024] * 1e-155, rows[:1_024] * 1e100])
    np.testing.assert_allclose(pilot_of(mixed).covariance, np.cov(mixed.T, bias=True), rtol=1e-12)


def test_weights_that_are_all_zero_are_refused(rows):
    with pytest.raises(DataError, match="All 5003 rows of the array have weight zero"):
        pilot_of(rows, weights=np.zeros(len(rows)))


def test_squares_that_overflow_are_refused_by_feature(rows):
    with pytest.raises(NumericalError, match="variance of feature 1 of the array overflows float64"):
        pilot_of(rows[:50] * [1.0, 1e200, 1.0])


def test_single_rows_and_constant_features():
    pilot = pilot_of(np.full((7, 2), 3.0), 2)
    assert np.array_equal(pilot.mean, [3.0, 3.0])
    assert np.array_equal(pilot.covariance, np.zeros((2, 2)))
    assert pilot_of(np.array([[2.0, 5.0]])).n_rows == 1
