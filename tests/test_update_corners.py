"""Corners of update: copies of a store, fits without a pass, units of which nothing is left, both ways of learning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from mixtures import assert_close, blobs

from streamgmm import GaussianMixture, load, open_source
from streamgmm.errors import DataError, ParameterError

SOLVERS = ["em", "incremental"]


def store_of(path: Path, rows: np.ndarray) -> zarr.Array[Any]:
    return zarr.create_array(path, data=rows, chunks=(100, 3))


def fitted(path: Path, **settings: Any) -> GaussianMixture:
    return GaussianMixture(3, random_state=0, tol=1e-2, **settings).fit(path)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_copy_that_grew_and_the_original_are_one_store(solver, tmp_path):
    """Rows that both have are learned once, whichever is shown; a restart in between."""
    store_of(tmp_path / "a.zarr", blobs(400))
    model = fitted(tmp_path / "a.zarr", solver=solver)
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    more = blobs(300, seed=1)
    zarr.open_array(tmp_path / "b.zarr").append(more[:200])
    assert model.update(tmp_path / "b.zarr", flush=True).n_rows == 200
    model.save(tmp_path / "m.sgmm")
    model = load(tmp_path / "m.sgmm")
    assert str(model.update(tmp_path / "a.zarr", flush=True)) == "a.zarr: nothing new."
    zarr.open_array(tmp_path / "a.zarr").append(more)
    assert model.update(tmp_path / "a.zarr", flush=True).n_rows == 100
    assert model.n_rows_ == 700


@pytest.mark.parametrize("solver", SOLVERS)
def test_copies_with_other_times_are_one_store_and_the_longest_must_not_be_cut(solver, tmp_path):
    """cp -r gives every chunk a new time, so all rows are compared, and the record is written anew."""
    store_of(tmp_path / "a.zarr", blobs(500))
    model = fitted(tmp_path / "a.zarr", solver=solver)
    subprocess.run(["cp", "-r", tmp_path / "a.zarr", tmp_path / "b.zarr"], check=True)
    one, other = zarr.open_array(tmp_path / "a.zarr"), zarr.open_array(tmp_path / "b.zarr")
    more = blobs(300, seed=1)
    other.append(more[:200])
    assert model.update(tmp_path / "b.zarr", flush=True).n_rows == 200
    assert model.update(tmp_path / "a.zarr", flush=True).n_units == 0
    one.append(more)
    assert model.update(tmp_path / "a.zarr", flush=True).n_rows == 100
    assert model.update(tmp_path / "b.zarr", flush=True).n_units == 0
    assert (model.n_rows_, len(model._online.ledger.stores)) == (800, 1)
    one.resize((700, 3))
    with pytest.raises(DataError, match=r"a\.zarr has 700 rows, but 800 of it were learned before"):
        model.update(tmp_path / "a.zarr")
    other[3] = 0.0
    with pytest.raises(DataError, match=r"b\.zarr: rows 0 to 99 were learned before and have changed"):
        model.update(tmp_path / "b.zarr")


def test_a_fit_without_a_pass_counts_its_rows_as_learned_too(tmp_path):
    array = store_of(tmp_path / "rows.zarr", blobs(400))
    model = fitted(tmp_path / "rows.zarr", max_iter=0)
    assert model.update(tmp_path / "rows.zarr", flush=True).n_units == 0
    array.append(blobs(100, seed=1))
    assert model.update(tmp_path / "rows.zarr", flush=True).n_rows == 100
    assert model.n_rows_ == 500


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_unit_of_which_nothing_is_left_is_passed_over(solver, tmp_path):
    array = store_of(tmp_path / "rows.zarr", blobs(400))
    model = fitted(tmp_path / "rows.zarr", solver=solver)
    array.append(np.concatenate([np.full((100, 3), np.nan), blobs(100, seed=1)]))
    source = open_source(tmp_path / "rows.zarr", nan_policy="omit")
    report = model.update(source, flush=True)
    assert (report.n_units, report.n_rows, report.n_skipped) == (2, 100, 100)
    assert str(report.batches[0]).endswith("rows.zarr[400:500]: all of its 100 rows are left out")
    assert (model.n_rows_, model.n_skipped_) == (500, 100)
    assert model.effective_rows_ == pytest.approx(500)
    model.save(tmp_path / "m.sgmm")
    assert load(tmp_path / "m.sgmm").update(source, flush=True).n_units == 0


def test_rows_that_are_kept_may_begin_with_nothing(tmp_path):
    store_of(tmp_path / "rows.zarr", np.concatenate([np.full((100, 3), np.nan), blobs(400)]))
    source = open_source(tmp_path / "rows.zarr", nan_policy="omit")
    model = GaussianMixture(3, random_state=0)
    assert model.update(source, flush=True).n_skipped == 100
    assert (model.n_rows_, model.n_skipped_) == (400, 100)


def test_a_store_filled_with_nan_is_no_batch(tmp_path):
    store_of(tmp_path / "rows.zarr", np.full((100, 3), np.nan))
    model = GaussianMixture(3, random_state=0).fit(blobs())
    with pytest.raises(DataError, match=r"All 100 rows of .* have NaN, so none is left"):
        model.partial_fit(open_source(tmp_path / "rows.zarr", nan_policy="omit"))


@pytest.mark.parametrize("stop", [True, -1, 1.5, [3]])
def test_a_stop_that_is_no_number_of_rows(stop, tmp_path):
    store_of(tmp_path / "rows.zarr", blobs(400))
    with pytest.raises(ParameterError, match="stop must be a number of rows or the name of an attribute"):
        fitted(tmp_path / "rows.zarr").update(tmp_path / "rows.zarr", stop=stop)


def test_a_named_batch_may_have_weights():
    weights = np.arange(600) % 3
    one, other = (GaussianMixture(3, random_state=0).fit(blobs()) for _ in range(2))
    assert one.update(blobs(600, seed=1), batch_id="monday", sample_weight=weights).n_rows == 600
    assert_close(one, other.partial_fit(blobs(600, seed=1), sample_weight=weights), 0.0)
    with pytest.raises(ParameterError, match="sample_weight goes with a named batch"):
        one.update("rows.zarr", sample_weight=weights)


def test_update_and_batches_take_turns_with_a_fit(tmp_path):
    """The ledger survives named batches, plain batches and streams; another fit begins a new one."""
    array = store_of(tmp_path / "rows.zarr", blobs(400))
    model = fitted(tmp_path / "rows.zarr")
    model.update(blobs(90, seed=2), batch_id="x")
    model.partial_fit(blobs(10, seed=3)).fit_stream([blobs(20, seed=4)])
    array.append(blobs(100, seed=1))
    assert model.update(tmp_path / "rows.zarr", flush=True).n_rows == 100
    assert model.update(blobs(90, seed=2), batch_id="x").n_rows == 0
    assert model.n_rows_ == 620
    model.fit(tmp_path / "rows.zarr")
    assert model.update(blobs(90, seed=2), batch_id="x").n_rows == 90
    assert model.n_stream_ == 0
