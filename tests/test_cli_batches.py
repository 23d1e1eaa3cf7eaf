"""The command line for batches and sites: what it leaves behind equals what Python gives."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import write_zarr
from mixtures import assert_identical
from test_cli import error_of, succeed

from streamgmm import GaussianMixture, load, open_source
from streamgmm.synthetic import random_mixture

ROWS = random_mixture(2, 3, 4.0, 0).rows(6_000, 0)[0]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """2,500 rows in chunks of 1,000, and a model of them beside it; 2,000 more rows came since."""
    path = write_zarr(tmp_path, ROWS[:2_500], 1_000)
    GaussianMixture(2, random_state=0).fit(str(path)).save(tmp_path / "model.sgmm")
    zarr.open_array(path).append(ROWS[2_500:4_500])
    return path


def test_update_learns_what_is_new_once(store: Path) -> None:
    model = store.parent / "model.sgmm"
    by_hand = load(model)
    by_hand.update(store)
    shown = succeed("update", store, model).stdout
    assert "rows.zarr: 1,500 new rows learned in 2 steps. 500 rows wait" in shown
    assert "say --stop ROWS, or --flush for all" in shown
    assert_identical(load(model), by_hand)
    assert "nothing new. 500 rows wait" in succeed("update", store, model).stdout
    assert "500 new rows learned in 1 step" in succeed("update", store, model, "--stop", 4_500, "--flush").stdout
    before = model.read_bytes()
    assert succeed("update", store, model, "--flush").stdout == f"{model}: rows.zarr: nothing new.\n"
    assert model.read_bytes() == before
    assert load(model).n_rows_ == 4_500


def test_update_reads_the_writer_s_attribute(store: Path) -> None:
    model = store.parent / "model.sgmm"
    assert "has no attribute 'written'" in error_of("update", store, model, "--stop", "written")
    zarr.open_array(store).attrs["written"] = 4_000
    assert "1,500 new rows" in succeed("update", store, model, "--stop", "written").stdout


def test_a_named_batch_is_learned_once(store: Path) -> None:
    model = store.parent / "model.sgmm"
    assert "monday: 4,500 new rows learned" in succeed("update", store, model, "--batch-id", "monday").stdout
    before = model.read_bytes()
    assert "monday: already learned, nothing done" in succeed("update", store, model, "--batch-id", "monday").stdout
    assert model.read_bytes() == before
    assert "Drop one" in error_of("update", store, model, "--batch-id", "tuesday", "--flush")


def test_update_hands_every_option_on(store: Path) -> None:
    array, model = zarr.open_array(store), store.parent / "model.sgmm"
    array[2_600, 1] = np.nan
    by_hand, before = load(model), model.read_bytes()
    assert "Input contains NaN in row 2600, column 1" in error_of("update", store, model)
    assert model.read_bytes() == before
    by_hand.update(open_source(store, nan_policy="omit", missing_chunks="wait"))
    shown = succeed("update", store, model, "--nan-policy", "omit").stdout
    assert "1,499 new rows" in shown
    assert_identical(load(model), by_hand)


def test_an_alarm_is_said(store: Path) -> None:
    zarr.open_array(store).append(ROWS[4_500:] + 1.0)
    shown = succeed("update", store, store.parent / "model.sgmm", "--flush").stdout
    assert re.search(r"[1-9] of them with an alarm of drift", shown)


def test_sites_merge_what_they_learned(store: Path) -> None:
    folder, model = store.parent, store.parent / "model.sgmm"
    there = write_zarr(folder, ROWS[3_000:], 1_000, name="there.zarr")
    for site in (store, there):
        shown = succeed("statistics", site, model, "-o", f"{site}.sgmm").stdout
        assert "components, full covariances, 3 features, at parameters" in shown
    shown = succeed("merge", f"{store}.sgmm", f"{there}.sgmm", "-o", folder / "merged.sgmm").stdout
    assert "statistics of 7,500 rows" in shown
    fitted = load(model)
    expected = GaussianMixture.from_statistics(fitted.statistics(store) + fitted.statistics(there))
    assert_identical(load(folder / "merged.sgmm"), expected)
    assert "statistics of 4,500 rows" in succeed("info", f"{store}.sgmm").stdout
    assert "exists already" in error_of("merge", f"{store}.sgmm", "-o", folder / "merged.sgmm")
    assert "exists already" in error_of("statistics", store, model, "-o", f"{store}.sgmm")
    succeed("merge", f"{store}.sgmm", "-o", folder / "merged.sgmm", "--overwrite")


def test_files_of_the_other_kind_are_refused(store: Path) -> None:
    folder, model = store.parent, store.parent / "model.sgmm"
    succeed("statistics", store, model, "-o", folder / "s.sgmm")
    assert "holds a GaussianMixture, but statistics was expected there" in error_of("merge", model, "-o", folder / "m")
    for command in ("update", "predict"):
        output = ("-o", folder / "l.zarr") if command == "predict" else ()
        assert "holds a Statistics, but a model was expected" in error_of(command, store, folder / "s.sgmm", *output)
    GaussianMixture(2, random_state=0).fit(ROWS).save(folder / "other.sgmm")
    succeed("statistics", store, folder / "other.sgmm", "-o", folder / "t.sgmm")
    words = "taken at the parameters of different models"
    assert words in error_of("merge", folder / "s.sgmm", folder / "t.sgmm", "-o", folder / "m.sgmm")


def test_info_of_a_model_that_waits_for_rows(tmp_path: Path) -> None:
    GaussianMixture(2).partial_fit(ROWS[:20]).save(tmp_path / "waits.sgmm")
    shown = succeed("info", tmp_path / "waits.sgmm").stdout
    assert shown == f"{tmp_path / 'waits.sgmm'}: no mixture yet: 20 of 190 rows are kept for a start\n"


def test_a_model_that_waits_for_rows_has_no_statistics_and_no_labels(store: Path) -> None:
    waits = store.parent / "waits.sgmm"
    GaussianMixture(2).partial_fit(ROWS[:20]).save(waits)
    words = "no mixture yet: 20 of 190 rows are kept for a start. Give it more rows first: streamgmm update STORE"
    for command, output in (("statistics", "s.sgmm"), ("predict", "l.zarr")):
        assert words in error_of(command, store, waits, "-o", store.parent / output)


def test_errors_of_update_speak_of_options(store: Path) -> None:
    model = store.parent / "model.sgmm"
    for stop in ("-5", "+5000"):
        assert "--stop " in error_of("update", store, model, f"--stop={stop}")
    assert "--stop must be a number of rows" in error_of("update", store, model, "--stop=-5")
    assert "--stop is 5000, but rows.zarr has 4,500" in error_of("update", store, model, "--stop", "5000")
    words = "--stop and --flush are for stores that grow, but --batch-id names a batch. Drop one."
    assert words in error_of("update", store, model, "--batch-id", "tuesday", "--flush")
    assert "--batch-id must be a name" in error_of("update", store, model, "--batch-id", "")


def test_a_site_is_merged_once(store: Path) -> None:
    succeed("statistics", store, store.parent / "model.sgmm", "-o", f"{store}.sgmm")
    words = "2 files of statistics are given, but only 1 different ones"
    again = store.parent / ".." / store.parent.name / f"{store.name}.sgmm"
    for path in (f"{store}.sgmm", again):
        assert words in error_of("merge", f"{store}.sgmm", path, "-o", store.parent / "merged.sgmm")
