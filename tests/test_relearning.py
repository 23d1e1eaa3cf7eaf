"""A store that was fitted by solver="incremental" and changes: blocks are taken back, learned again, and added."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import write_zarr
from mixtures import KINDS, assert_identical, blobs, given_start
from support import absolute_terms, assert_same

from streamgmm import GaussianMixture, files, load, open_source, relearning, remembered
from streamgmm.caches import record_length
from streamgmm.covariance.full import FullCovariance
from streamgmm.errors import DataError, FileFormatError
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.remembered import Remembered
from streamgmm.settings import Settings
from streamgmm.solvers.incremental import total_of
from streamgmm.stats import Frame, SufficientStats

CHUNK, N = 50, 500


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_zarr(tmp_path, blobs(N), CHUNK)


def fit(store: Any, block_rows: int | None = CHUNK, kind: str = "full", **settings: Any) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = {"solver": "incremental", "random_state": 0, **given_start(kind), **settings}
        return GaussianMixture(3, covariance_type=kind, **chosen).fit(open_source(store, block_rows=block_rows))


def rewrite(store: Path, start: int, rows: np.ndarray) -> None:
    """Write over rows."""
    zarr.open_array(str(store), mode="r+")[start : start + len(rows)] = rows


def grow(store: Path, rows: np.ndarray) -> None:
    array = zarr.open_array(str(store), mode="r+")
    n = array.shape[0]
    array.resize((n + len(rows), rows.shape[1]))
    array[n:] = rows


def kept(model: GaussianMixture) -> Remembered:
    assert model._online is not None
    assert model._online.remembered is not None
    return model._online.remembered


def params_of(model: GaussianMixture) -> MixtureParams:
    return model._params()


def statistics(model: GaussianMixture, params: MixtureParams, rows: np.ndarray) -> SufficientStats:
    """Of rows at ``params``, about its means and in the scale of the model's blocks."""
    scale = kept(model).blocks[0].scale
    scorer = prepare(params, Frame(params.frame().shift, scale))
    blocks = open_source(rows).blocks()
    return SerialExecutor().map_reduce(e_step, (scorer,), blocks).values[0].about(params.means, scale)


def total(model: GaussianMixture) -> SufficientStats:
    blocks = kept(model).blocks
    return total_of(blocks, params_of(model).means, blocks[0].scale)


def assert_running_is_the_sum(model: GaussianMixture) -> None:
    """What goes on from batch to batch is made of the blocks, each row counting once."""
    online, wanted = model._online, total(model)
    assert online is not None
    assert online.running is not None
    running = online.running
    assert running.memory == pytest.approx(wanted.weight, rel=1e-12)
    moments = running.stats.about(wanted.origin, wanted.scale).moments * wanted.weight
    np.testing.assert_allclose(moments, wanted.moments, atol=1e-9 * wanted.weight)
    assert model.n_rows_ == wanted.n_rows


# -- what has changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_changed_is_taken_back_and_learned_again(kind: str, store: Path) -> None:
    """Its statistics are those of the new rows at the parameters that the update found, to 1e-10 of their terms."""
    model = fit(store, kind=kind, max_iter=4)
    before, params = kept(model), params_of(model)
    rows = blobs(CHUNK, seed=8)
    rewrite(store, 150, rows)
    report = model.update(store)
    assert (report.n_units, report.n_rows, report.n_again) == (1, 0, CHUNK)
    assert "0 new rows learned and 50 learned again in 1 step" in str(report)
    assert report.batches[0].again
    assert report.batches[0].remark == "taken back and learned again: 50 of these rows had changed"
    wanted = statistics(model, params, rows)
    assert_same(kept(model).blocks[3], wanted, absolute_terms(kind, params, rows, wanted), 1e-10)
    for number in {*range(10)} - {3}:
        assert kept(model).blocks[number] is before.blocks[number]
    assert_running_is_the_sum(model)
    assert model.update(store).n_units == 0, "it is learned now"


def test_a_change_in_a_larger_block_teaches_all_of_it(store: Path) -> None:
    model = fit(store, None, max_iter=3)
    assert kept(model).stops == (N,), "one block of ten chunks"
    params = params_of(model)
    rewrite(store, 60, blobs(20, seed=5))
    report = model.update(store)
    assert (report.n_units, report.n_again) == (1, N)
    assert "taken back and learned again: 50 of these rows had changed" in str(report)
    rows = zarr.open_array(str(store))[:]
    wanted = statistics(model, params, rows)
    assert_same(kept(model).blocks[0], wanted, absolute_terms("full", params, rows, wanted), 1e-10)


def test_rows_written_again_as_they_were_are_left_alone(store: Path) -> None:
    model = fit(store, max_iter=3)
    before = kept(model)
    rewrite(store, 100, blobs(N)[100:150])
    assert model.update(store).n_units == 0
    assert kept(model) is before


def test_several_changes_and_new_rows_come_in_one_update(store: Path) -> None:
    model = fit(store, max_iter=3)
    rewrite(store, 0, blobs(CHUNK, seed=3))
    rewrite(store, 400, blobs(CHUNK, seed=4))
    grow(store, blobs(120, seed=6))
    report = model.update(store, stop=620)
    assert (report.n_units, report.n_rows, report.n_again, report.waiting) == (4, 100, 100, 20)
    assert [batch.again for batch in report.batches] == [True, True, False, False]
    assert kept(model).stops[-3:] == (500, 550, 600)
    assert model.n_rows_ == 600
    assert_running_is_the_sum(model)


def test_after_an_update_a_fit_goes_on_to_the_optimum_of_the_new_rows(store: Path) -> None:
    settings = {"tol": 1e-12, "max_iter": 3_000, "reg_covar": 0.0}
    model = fit(store, **settings)
    rewrite(store, 200, blobs(CHUNK, seed=3))
    model.update(store)
    model.set_params(warm_start=True).fit(open_source(store, block_rows=CHUNK))
    fresh = fit(store, **settings)
    np.testing.assert_allclose(model.means_, fresh.means_, atol=1e-5)
    assert model.lower_bound_ == pytest.approx(fresh.lower_bound_, abs=1e-10)


def test_many_updates_leave_no_rounding_behind(store: Path) -> None:
    """A block that is changed to and fro: the total is the sum of the blocks, not a history of differences."""
    model = fit(store, max_iter=3)
    for seed in range(12):
        rewrite(store, 50 * (seed % 3), (10.0 ** (seed % 4)) * blobs(CHUNK, seed=seed))
        model.update(store)
    assert model.n_steps_ == 12
    assert_running_is_the_sum(model)


# -- what is new ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_added_and_no_old_one_fades(kind: str, store: Path) -> None:
    model = fit(store, kind=kind, max_iter=4)
    params, before = params_of(model), total(model)
    rows = blobs(CHUNK, seed=2)
    grow(store, rows)
    report = model.update(store, flush=True)
    assert (report.n_units, report.n_rows, report.n_again) == (1, CHUNK, 0)
    assert report.batches[0].step == pytest.approx(CHUNK / (N + CHUNK))
    assert model.effective_rows_ == pytest.approx(N + CHUNK)
    new = statistics(model, params, rows)
    assert_same(kept(model).blocks[-1], new, absolute_terms(kind, params, rows, new), 1e-10)
    origin = params.means
    sum_of_both = before.about(origin, new.scale) + new
    found = total_of(kept(model).blocks, origin, new.scale)
    np.testing.assert_allclose(found.moments, sum_of_both.moments, atol=1e-10 * (N + CHUNK))
    assert_running_is_the_sum(model)


def test_a_rest_that_is_learned_and_then_grows(store: Path) -> None:
    model = fit(store, max_iter=2)
    for n, stop in [(20, 520), (30, 550), (75, 625)]:
        grow(store, blobs(n, seed=n))
        model.update(store, stop=stop, flush=True)
    assert kept(model).stops[-4:] == (520, 550, 600, 625)
    rewrite(store, 510, blobs(5, seed=1))
    assert model.update(store).n_again == 20, "both units of the chunk have another stamp, but one has other rows"


# -- in a file, and in another order -------------------------------------------------------------------------------


def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(store: Path, tmp_path: Path) -> None:
    model = fit(store, max_iter=3)
    model.save(tmp_path / "model.sgmm")
    again = load(tmp_path / "model.sgmm")
    rewrite(store, 250, blobs(CHUNK, seed=1))
    grow(store, blobs(CHUNK, seed=2))
    for one in (model, again):
        report = one.update(store, flush=True)
        assert (report.n_rows, report.n_again) == (CHUNK, CHUNK)
    assert_identical(model, again)


def test_reordered_components_are_reordered_in_the_blocks(store: Path) -> None:
    model = fit(store, max_iter=3)
    other = model.reordered([2, 0, 1])
    rewrite(store, 250, blobs(CHUNK, seed=1))
    model.update(store)
    other.update(store)
    np.testing.assert_allclose(other.means_, model.means_[[2, 0, 1]], rtol=1e-12)


def broken(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        contents = files.read(path, "model")
        arrays = {name: array.copy() for name, array in contents.arrays.items()}
        change(arrays)
        files.write(path, replace(contents, arrays=arrays))

    return write


def shifted(arrays: dict[str, Any]) -> None:
    arrays["blocks_stops"] += 1


def negative(arrays: dict[str, Any]) -> None:
    arrays["blocks_records"][2, 0] = -5.0


def infinite(arrays: dict[str, Any]) -> None:
    arrays["blocks_records"][2, 3] = np.inf


def short(arrays: dict[str, Any]) -> None:
    arrays["blocks_records"] = arrays["blocks_records"][:, 1:]


def disordered(arrays: dict[str, Any]) -> None:
    arrays["blocks_stops"][:2] = arrays["blocks_stops"][:2][::-1]


def scaled(arrays: dict[str, Any]) -> None:
    arrays["blocks_records"][1, -8:-5] *= 2.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shifted, "not made of the units"),
        (negative, "masses that do not sum"),
        (infinite, "not finite"),
        (short, "is expected"),
        (disordered, "do not follow on each other"),
        (scaled, "different scales"),
    ],
)
def test_blocks_that_no_fit_left_behind_are_refused(change: Any, words: str, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.sgmm"
    fit(store, max_iter=1).save(path)
    broken(change)(path)
    with pytest.raises(FileFormatError, match=words):
        load(path)


# -- where nothing is kept -----------------------------------------------------------------------------------------


def refuses_a_change(model: GaussianMixture, store: Path) -> None:
    rewrite(store, 150, blobs(CHUNK, seed=8))
    before = model.means_.copy()
    with pytest.raises(DataError, match=r"rows 150 to 199 were learned before and have changed since"):
        model.update(store)
    np.testing.assert_array_equal(model.means_, before)


def test_textbook_em_keeps_nothing(store: Path) -> None:
    model = fit(store, solver="em")
    assert model._online is not None
    assert model._online.remembered is None
    refuses_a_change(model, store)


def test_too_many_blocks_are_not_kept_and_the_log_says_so(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        remembered, "MOST_BYTES_IN_MEMORY", 9 * 8 * record_length(type(fit(store)._params().covariance), 3, 3)
    )
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        model = fit(store)
    assert "the statistics of 10 blocks are too many for a model: its rows cannot be taken back" in caplog.messages
    refuses_a_change(model, store)


def test_blocks_that_no_longer_fit_are_let_go(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = fit(store)
    monkeypatch.setattr(remembered, "MOST_BYTES_IN_MEMORY", 10 * 8 * record_length(FullCovariance, 3, 3))
    grow(store, blobs(CHUNK, seed=2))
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        assert model.update(store, flush=True).n_rows == CHUNK
    assert "the statistics of blocks are let go" in caplog.text
    refuses_a_change(model, store)


@pytest.mark.parametrize("way", ["partial_fit", "batch", "store"])
def test_another_batch_lets_the_blocks_go(way: str, store: Path, tmp_path: Path) -> None:
    model, rows = fit(store), blobs(100, seed=9)
    if way == "partial_fit":
        model.partial_fit(rows)
    elif way == "batch":
        model.update(rows, batch_id="night")
    else:
        model.update(write_zarr(tmp_path, rows, CHUNK, name="other.zarr"), flush=True)
    refuses_a_change(model, store)


def test_weights_are_not_kept(store: Path) -> None:
    source = open_source(store, block_rows=CHUNK)
    model = GaussianMixture(3, solver="incremental", random_state=0, **given_start("full"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(source, sample_weight=np.full(N, 2.0))
    refuses_a_change(model, store)


@pytest.mark.parametrize(
    "settings", [{"forgetting": {"half_life": 100}}, {"average": True}], ids=["forgets", "averages"]
)
def test_where_old_rows_are_to_fade_units_are_steps(settings: dict[str, Any], store: Path) -> None:
    model = fit(store).set_params(**settings)
    refuses_a_change(model, store)
    assert model._online is not None
    assert not relearning.takes_back(model._online, Settings.of(model.get_params(deep=False)))


def test_a_change_that_cannot_be_learned_leaves_the_model_and_is_found_again(store: Path) -> None:
    model = fit(store)
    before, means = kept(model), model.means_.copy()
    rows = blobs(CHUNK, seed=8)
    rows[7, 1] = np.nan
    rewrite(store, 150, rows)
    for _ in range(2):
        with pytest.raises(DataError, match="row 157, column 1"):
            model.update(store)
        np.testing.assert_array_equal(model.means_, means)
        assert kept(model).blocks == before.blocks
    rewrite(store, 150, np.nan_to_num(rows))
    assert model.update(store).n_again == CHUNK


def test_a_store_that_was_cut_is_an_error_still(store: Path) -> None:
    model = fit(store)
    zarr.open_array(str(store), mode="r+").resize((400, 3))
    with pytest.raises(DataError, match="has 400 rows, but 500 of it were learned before"):
        model.update(store)


def test_a_store_that_moved_keeps_its_blocks(store: Path, tmp_path: Path) -> None:
    model = fit(store)
    moved = store.rename(tmp_path / "moved.zarr")
    rewrite(moved, 150, blobs(CHUNK, seed=8))
    report = model.update(moved)
    assert (report.n_rows, report.n_again) == (0, CHUNK)
