"""Update learns what is new, each row once, however its calls are divided, interrupted or begun again elsewhere."""

from __future__ import annotations

import resource
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import write_zarr
from growing_stores import CHUNK, PROCESSES, append, file_of, new_store, restarted, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import assert_identical

from streamgmm import GaussianMixture, load, open_source, updating
from streamgmm.errors import DataError, ParameterError

#: Rows of the store in most tests, which ends within a chunk; and those of it that a fit has seen.
ROWS, FITTED = 913, 500

#: Ways to learn that carry more than running statistics.
SETTINGS = {
    "plain": {},
    "averaged": {"average": True, "covariance_type": "diag", "step_exponent": 0.6},
    "forgetting": {"forgetting": {"half_life": 300}, "covariance_type": "tied"},
}


def mixture(**settings: Any) -> GaussianMixture:
    return GaussianMixture(3, random_state=0, **settings)


def fitted(folder: Path, **settings: Any) -> GaussianMixture:
    """A model that was fitted to the first rows of the store, which has grown since."""
    array = new_store(folder / "rows.zarr", FITTED)
    model = mixture(**settings).fit(folder / "rows.zarr")
    append(array, ROWS)
    return model


# -- a month and a day ---------------------------------------------------------------------------------------------


def updated_elsewhere(saved: Path, path: Path, stop: int) -> Any:
    model = load(saved)
    report = model.update(path, stop=stop, flush=True)
    model.save(saved)
    return report


def test_after_a_month_a_day_is_learned_in_a_new_process_and_only_once(tmp_path):
    path, saved, days, day = tmp_path / "rows.zarr", tmp_path / "model.sgmm", 30_000, 50_000
    array = new_store(path, days, chunk=700)
    mixture().fit(path).save(saved)
    append(array, days + day)
    for expected in (day, 0):
        before = saved.read_bytes()
        with ProcessPoolExecutor(1, mp_context=PROCESSES) as process:
            report = process.submit(updated_elsewhere, saved, path, days + day).result()
        assert (report.n_rows, report.waiting) == (expected, 0)
        assert load(saved).n_rows_ == days + day
    assert report.n_units == 0
    assert str(report) == "rows.zarr: nothing new."
    assert saved.read_bytes() == before


# -- however it is divided -----------------------------------------------------------------------------------------


@cache
def table(folder: Path, name: str) -> tuple[bytes, bytes]:
    """A store, the file of a model that was fitted to its first rows, and that of one that has learned the rest."""
    model = fitted(folder, **SETTINGS[name])
    before = file_of(model, folder)
    model.update(folder / "rows.zarr", stop=ROWS)
    return before, file_of(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("table")


stops = st.lists(st.integers(0, ROWS), max_size=6).map(sorted)


@pytest.mark.parametrize("name", SETTINGS)
@given(stops=stops, restarts=st.booleans())
def test_the_calls_of_update_divide_nothing(folder, name, stops, restarts):
    home = folder / name
    home.mkdir(exist_ok=True)
    before, after = table(home, name)
    (home / "model.sgmm").write_bytes(before)
    model = load(home / "model.sgmm")
    for stop in [*stops, ROWS]:
        model.update(home / "rows.zarr", stop=stop)
        if restarts:
            model = restarted(model, home)
    assert file_of(model, home) == after


@settings(max_examples=min(100, settings.default.max_examples))
@given(ends=st.lists(st.integers(2, 400), max_size=5).map(sorted), by=st.sampled_from(["stop", "what is written"]))
def test_rows_before_a_start_are_kept_from_process_to_process(tmp_path_factory, ends, by):
    """170 rows are needed for a start. What the store holds is learned the same, however often one looks at it."""
    home = tmp_path_factory.mktemp("kept")
    array, model = new_store(home / "rows.zarr", 1), mixture()
    for end in [*ends, 401]:
        if end > array.shape[0]:
            append(array, end)
        model.update(home / "rows.zarr", stop=end if by == "stop" else None)
        model = restarted(model, home)
    model.update(home / "rows.zarr", flush=True)
    at_once = mixture()
    at_once.update(home / "rows.zarr", flush=True)
    assert model.n_rows_ == 401
    assert file_of(model, home) == file_of(at_once, home)


def test_rows_that_are_kept_are_said(tmp_path):
    new_store(tmp_path / "rows.zarr", 100)
    model = mixture()
    report = model.update(tmp_path / "rows.zarr")
    assert (report.n_rows, report.waiting, report.batches[-1].started) == (80, 20, False)
    assert "kept for a start: 80 of 170 rows are there" in str(report)
    assert "80 of 170 rows are kept for a start" in repr(restarted(model, tmp_path))
    assert model.n_rows_ == 80


def test_a_flush_cuts_where_it_is_asked_for(tmp_path):
    """The rest that it learns is a unit of its own, and the next one ends where units end."""
    model = fitted(tmp_path)
    reports = [model.update(tmp_path / "rows.zarr", stop=stop, flush=True) for stop in (510, 511, 700)]
    assert [report.n_rows for report in reports] == [10, 1, 189]
    assert [batch.n_rows for batch in reports[-1].batches] == [9, 40, 40, 40, 40, 20]


# -- interrupted ---------------------------------------------------------------------------------------------------


def interrupted(saved: Path, path: Path, seconds: float) -> bool:
    """Learn all rows, with Ctrl-C after so many seconds of work, and begun again; whether it came to that."""
    signal.signal(signal.SIGVTALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    model, came = load(saved), False
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        model.update(path, stop=ROWS)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    except KeyboardInterrupt:
        came = True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    model.update(path, stop=ROWS)
    model.save(saved)
    return came


def seconds_of_work(before: bytes, saved: Path, path: Path) -> float:
    """Of the process, to learn all rows; the median of some."""
    found = []
    for _ in range(5):
        saved.write_bytes(before)
        model = load(saved)
        began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        model.update(path, stop=ROWS)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - began)
    return float(np.median(found))


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_an_interrupt_leaves_a_model_that_goes_on(tmp_path, request):
    """And a process that goes on: zarr's threads serve the next read."""
    model, path, saved = fitted(tmp_path), tmp_path / "rows.zarr", tmp_path / "model.sgmm"
    before = file_of(model, tmp_path)
    model.update(path, stop=ROWS)
    after, times = file_of(model, tmp_path), 2_000 if request.config.getoption("--long") else 20
    work = seconds_of_work(before, saved, path)
    came = 0
    for number, seconds in enumerate(np.random.default_rng(0).uniform(0.0, 1.0, times) * work + 1e-4):
        saved.write_bytes(before)
        came += interrupted(saved, path, seconds)
        assert saved.read_bytes() == after, (number, seconds)
    assert came > times / 10


def test_a_checkpoint_is_saved_on_the_way_and_at_the_end(tmp_path, monkeypatch):
    model = fitted(tmp_path)
    saves, save = [], model.save
    monkeypatch.setattr(updating, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(model, "save", lambda path: (saves.append(model.n_rows_), save(path)))
    report = model.update(tmp_path / "rows.zarr", checkpoint=tmp_path / "model.sgmm")
    monkeypatch.undo()
    assert saves == [FITTED + sum(b.n_rows for b in report.batches[:n]) for n in range(1, 11)] + [880]
    assert (tmp_path / "model.sgmm").read_bytes() == file_of(model, tmp_path)


# -- a unit that cannot be learned ---------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["fitted", "with nothing"])
def test_units_before_a_bad_one_stay_learned_and_update_goes_on_once_it_is_mended(tmp_path, begin):
    path = tmp_path / "rows.zarr"
    array = new_store(path, 5 * CHUNK)
    whole = shutil.copytree(path, tmp_path / "whole" / "rows.zarr")
    model = undisturbed = mixture()
    if begin == "fitted":
        write_zarr(tmp_path, rows_of(0, FITTED), FITTED, name="other.zarr")
        model.fit(tmp_path / "other.zarr")
        undisturbed = restarted(model, tmp_path)
    learned = 0 if begin == "with nothing" else FITTED
    array[3 * CHUNK + 7, 1] = np.nan
    for _ in range(2):
        with pytest.raises(DataError, match=r"NaN in row 127, column 1 \(chunk 3/0 of rows.zarr\)"):
            model.update(path, flush=True)
        assert model.n_rows_ == learned + 3 * CHUNK
        model = restarted(model, tmp_path)
    array[3 * CHUNK : 4 * CHUNK] = rows_of(3 * CHUNK, 4 * CHUNK)
    assert model.update(path, flush=True).n_rows == 2 * CHUNK
    if begin == "with nothing":
        undisturbed = mixture()
    undisturbed.update(whole, flush=True)
    assert_identical(model, undisturbed)
    assert (model.n_rows_, model.n_steps_) == (undisturbed.n_rows_, undisturbed.n_steps_)


def test_a_model_is_as_it_was_where_nothing_could_be_learned(tmp_path):
    new_store(tmp_path / "rows.zarr", 100)[5] = np.nan
    model = mixture()
    before = dict(vars(model))
    for stop, words in [("rows_written", "has no attribute 'rows_written'"), (80, "NaN in row 5, column 0")]:
        with pytest.raises(DataError, match=words):
            model.update(tmp_path / "rows.zarr", stop=stop)
        assert vars(model) == before
    zarr.create_array(str(tmp_path / "wide.zarr"), data=np.random.default_rng(0).normal(size=(80, 3)), chunks=(40, 3))
    assert model.update(tmp_path / "wide.zarr", flush=True).n_rows == 80


# -- named batches -------------------------------------------------------------------------------------------------


def test_a_named_batch_is_learned_once_in_whatever_process(tmp_path):
    model = fitted(tmp_path)
    report = model.update(rows_of(1000, 1100), batch_id="Tuesday")
    assert (report.name, report.n_units, report.n_rows, model.n_rows_) == ("Tuesday", 1, 100, FITTED + 100)
    assert model.report_ == report.batches[-1]
    learned = file_of(model, tmp_path)
    for same in (model, restarted(model, tmp_path)):
        report = same.update(rows_of(2000, 2100), batch_id="Tuesday")
        assert (report.n_units, report.n_rows, report.batches[-1].learned) == (0, 0, False)
        assert str(report) == "Tuesday: already learned, nothing done."
        assert file_of(same, tmp_path) == learned
    model.update(rows_of(2000, 2100), batch_id="Wednesday")
    assert model.n_rows_ == FITTED + 200


def test_a_named_batch_is_a_step_of_partial_fit(tmp_path):
    one, other = fitted(tmp_path), fitted(tmp_path / "other")
    one.update(open_source(rows_of(1000, 1100)), batch_id="x")
    other.partial_fit(rows_of(1000, 1100))
    assert_identical(one, other)


def test_a_batch_that_cannot_be_learned_is_not_remembered(tmp_path):
    model = fitted(tmp_path)
    before = file_of(model, tmp_path)
    with pytest.raises(DataError, match="NaN in row 0, column 0"):
        model.update(np.full((5, 2), np.nan), batch_id="Tuesday")
    assert file_of(model, tmp_path) == before
    assert model.update(rows_of(1000, 1100), batch_id="Tuesday").n_rows == 100


def test_batches_and_stores_go_side_by_side(tmp_path):
    model = fitted(tmp_path)
    model.update(rows_of(1000, 1100), batch_id="Tuesday")
    assert model.update(tmp_path / "rows.zarr", flush=True).n_rows == ROWS - FITTED
    assert model.update(rows_of(1000, 1100), batch_id="Tuesday").n_units == 0
    assert model.n_rows_ == ROWS + 100


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (rows_of(0, 9), {"batch_id": "x", "stop": 3}, "stop and flush are for stores that grow, but batch_id names"),
        (rows_of(0, 9), {"batch_id": "x", "flush": True}, "stop and flush are for stores that grow"),
        (rows_of(0, 9), {"batch_id": ""}, "batch_id must be a name that is not empty, but it is ''"),
        (rows_of(0, 9), {"batch_id": 3}, "batch_id must be a name that is not empty, but it is 3"),
        (rows_of(0, 9), {}, "Which rows of a ndarray were learned before cannot be known. Give the zarr store, or the"),
        ([[1.0, 2.0]], {}, "Which rows of a list were learned before"),
        (open_source(rows_of(0, 9)), {"flush": True}, "Which rows of a MemorySource were learned before"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, rows, options, words):
    model = fitted(tmp_path)
    before = file_of(model, tmp_path)
    with pytest.raises(ParameterError, match=words):
        model.update(rows, **options)
    assert file_of(model, tmp_path) == before


def test_another_number_of_features_is_refused(tmp_path):
    model = fitted(tmp_path)
    write_zarr(tmp_path, np.ones((50, 3)), 10, name="wide.zarr")
    with pytest.raises(DataError, match=r"wide.zarr has 3 features, but GaussianMixture is expecting 2"):
        model.update(tmp_path / "wide.zarr")
    with pytest.raises(DataError, match="X has 3 features, but GaussianMixture is expecting 2"):
        model.update(np.ones((50, 3)), batch_id="wide")
