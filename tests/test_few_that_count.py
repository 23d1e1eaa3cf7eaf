"""Rows that do not count, because of NaN or a weight of zero, cost the start nothing but a second read."""

from __future__ import annotations

import logging
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import KINDS, blobs, given_start

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError
from streamgmm.executors import SerialExecutor
from streamgmm.fitting import MOST_DRAWN, SMALLEST_SAMPLE, _pilot
from streamgmm.history import Log

N, KEPT = 300_000, 900


@pytest.fixture(scope="module")
def holes() -> np.ndarray:
    """900 whole rows among 300,000 that have NaN."""
    rows = np.full((N, 3), np.nan)
    rows[np.sort(np.random.default_rng(0).choice(N, KEPT, replace=False))] = blobs(KEPT)
    return rows


def test_a_second_read_finds_the_rows_that_count(holes: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(holes, nan_policy="omit")
    with caplog.at_level(logging.INFO, "streamgmm"):
        pilot, reads, _ = _pilot(source, SerialExecutor(), None, 7, SMALLEST_SAMPLE, Log(), seeks=True)
    assert reads == 2
    assert len(pilot.sample) == KEPT
    (line,) = caplog.messages
    assert line.endswith(
        "of the 20,000 rows drawn for the start count, the others have weight zero or NaN: one more read draws 300,000"
    )


def test_the_reads_are_counted_and_the_start_is_as_good_as_without_the_others(holes: np.ndarray) -> None:
    model = GaussianMixture(3, solver="em", random_state=0).fit(open_source(holes, nan_policy="omit"))
    alone = GaussianMixture(3, solver="em", random_state=0).fit(holes[~np.isnan(holes[:, 0])])
    assert model.n_passes_ == model.n_iter_ + 2
    assert alone.n_passes_ == alone.n_iter_ + 1
    assert (model.n_rows_, model.n_skipped_) == (KEPT, N - KEPT)
    assert abs(model.lower_bound_ - alone.lower_bound_) < 5e-3


def test_a_given_start_needs_no_second_read(holes: np.ndarray) -> None:
    source = open_source(holes, nan_policy="omit")
    model = GaussianMixture(3, solver="em", **given_start("full")).fit(source)
    assert model.n_passes_ == model.n_iter_ + 1
    again = model.set_params(weights_init=None, warm_start=True).fit(source)
    assert again.n_passes_ == again.n_iter_ + 1


@pytest.mark.parametrize("home", ["zarr", "dask"])
def test_weights_of_zero_that_are_not_in_memory_are_the_same(home: str, holes: np.ndarray, tmp_path: Path) -> None:
    rows, weights = np.nan_to_num(holes), (~np.isnan(holes[:, 0])).astype(float)
    if home == "zarr":
        zarr.create_array(str(tmp_path / "w.zarr"), data=weights, chunks=(50_000,))
    given = tmp_path / "w.zarr" if home == "zarr" else da.from_array(weights, chunks=50_000)
    model = GaussianMixture(3, solver="em", random_state=0).fit(rows, sample_weight=given)
    alone = GaussianMixture(3, solver="em", random_state=0).fit(rows[weights > 0])
    assert model.n_passes_ == model.n_iter_ + 2
    assert abs(model.lower_bound_ - alone.lower_bound_) < 5e-3


def test_where_half_of_them_count_one_read_is_enough() -> None:
    rows = blobs(60_000)
    rows[::3] = np.nan
    pilot, reads, _ = _pilot(
        open_source(rows, nan_policy="omit"), SerialExecutor(), None, 7, SMALLEST_SAMPLE, Log(), seeks=True
    )
    assert reads == 1
    assert 12_500 < len(pilot.sample) < 14_200
    pilot, reads, _ = _pilot(
        open_source(rows[:300], nan_policy="omit"), SerialExecutor(), None, 7, 300, Log(), seeks=True
    )
    assert (reads, len(pilot.sample)) == (1, 200)


def test_what_is_drawn_has_a_limit(holes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 8 * MOST_DRAWN < 10e6, "dask calls larger graphs large"
    monkeypatch.setattr("streamgmm.fitting.MOST_DRAWN", 50_000)
    pilot, reads, _ = _pilot(
        open_source(holes, nan_policy="omit"), SerialExecutor(), None, 7, SMALLEST_SAMPLE, Log(), seeks=True
    )
    assert reads == 2
    assert 100 < len(pilot.sample) < 200


def test_too_few_for_a_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.full((100_000, 2), np.nan)
    rows[::20_000] = np.arange(10.0).reshape(5, 2)
    monkeypatch.setattr("streamgmm.fitting.MOST_DRAWN", 20_000)
    with pytest.raises(
        DataError, match=r"Only [01234] of the rows that were drawn .* but n_components=5. Leave the rows"
    ):
        GaussianMixture(5, random_state=3).fit(open_source(rows, nan_policy="omit"))


@pytest.mark.parametrize("kind", KINDS)
def test_one_far_row_does_not_spoil_the_start(kind: str) -> None:
    """A cluster of one row weighs as much as one row, also where all clusters share their covariance."""
    rows = 3.0 * blobs(30_000)
    clean = GaussianMixture(3, covariance_type=kind, random_state=0).fit(rows).score(rows)
    spoilt = np.concatenate([rows, [[1e4, -1e4, 1e4]]])
    model = GaussianMixture(4, covariance_type=kind, random_state=0).fit(spoilt)
    assert model.score(rows) > clean - 0.05
