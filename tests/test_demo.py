"""The demo: what it writes, says and finds, and that it leaves alone what is not its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import Result
from test_cli import error_of, succeed

from streamgmm import demo, files, load
from streamgmm.synthetic import Mixture

ROWS = 40_000
FILES = ("rows.zarr", "model.sgmm", "mixture.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder in which the demo has run, and what it said."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, succeed("demo", folder, "--rows", ROWS)


def test_demo_says_what_it_writes_reads_and_finds(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert "Writing 40,000 rows x 4 features float32 (0.64 MB in 1 chunks) to" in result.stderr
    assert "rows.zarr: 40,000 rows x 4 features, 640 kB a pass" in result.stderr
    passes = re.findall(r"^pass +\d+ .*$", result.stderr, re.MULTILINE)
    assert "converged" in passes[-1]
    assert len(passes) == 1 + load(folder / "model.sgmm").n_iter_, "the sample, and the reads after it"
    assert len(re.findall(r"^\d +true ", result.stdout, re.MULTILINE)) == 5
    assert len(re.findall(r"^ +fitted ", result.stdout, re.MULTILINE)) == 5
    for name in FILES:
        assert str(folder / name) in result.stdout
        assert (folder / name).exists()
    assert (folder / "mixture.png").read_bytes().startswith(b"\x89PNG")


def test_demo_recovers_the_truth(finished: tuple[Path, Result]) -> None:
    found = re.search(r"of a mean: ([\d.]+) .* component: ([\d.]+)\)", finished[1].stdout)
    assert found is not None
    assert float(found[1]) < 5 * float(found[2])
    truth = demo.known_mixture(0)
    fitted = load(finished[0] / "model.sgmm")
    order = truth.match(fitted.means_)
    distance = np.abs(fitted.means_[order] - truth.means) / truth.deviations
    assert distance.max() == pytest.approx(float(found[1]), abs=1e-4)
    assert np.abs(fitted.weights_[order] - truth.weights).max() < 5 * np.sqrt(0.25 / ROWS)


def test_demo_rows_are_checksummed_and_complete(finished: tuple[Path, Result]) -> None:
    store = finished[0] / "rows.zarr"
    array = zarr.open_array(str(store), mode="r")
    assert array.metadata.zarr_format == 3
    assert '"checksum":true' in (store / "zarr.json").read_text().replace(" ", "")
    assert np.isnan(array.fill_value)
    truth = demo.known_mixture(0)
    np.testing.assert_array_equal(array[:], truth.rows(ROWS, 0)[0].astype(np.float32))


def test_the_table_shows_fitted_parameters_below_the_true_ones() -> None:
    truth = Mixture(np.array([0.25, 0.75]), np.array([[0.0], [5.0]]), np.array([[[1.0]], [[4.0]]]))
    estimate = Mixture(np.array([0.2, 0.8]), np.array([[0.5], [4.0]]), np.array([[[1.0]], [[4.0]]]))
    assert demo.comparison(truth, estimate) == (
        "#          weight    feature 0\n"
        "0    true  0.2500  0.00 ± 1.00\n"
        "   fitted  0.2000  0.50 ± 1.00\n"
        "1    true  0.7500  5.00 ± 2.00\n"
        "   fitted  0.8000  4.00 ± 2.00"
    )
    assert demo.verdict(truth, estimate, 400) == (
        "Largest difference of a mean: 0.5000 standard deviations (standard error of the rarest component: 0.1000)."
    )


def test_demo_writes_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CHUNK_ROWS", 1_000)
    succeed("demo", tmp_path, "--rows", 2_500, "--seed", 3)
    array = zarr.open_array(str(tmp_path / "rows.zarr"), mode="r")
    truth = demo.known_mixture(3)
    expected = np.concatenate([rows for rows, _ in truth.chunks(2_500, 1_000, 3)])
    np.testing.assert_array_equal(array[:], expected.astype(np.float32))
    assert array.nchunks_initialized == 3


def test_demo_runs_again_in_its_own_folder(tmp_path: Path) -> None:
    succeed("demo", tmp_path, "--rows", 3_000)
    before = files.read(tmp_path / "model.sgmm", "model")
    succeed("demo", tmp_path, "--rows", 3_000)
    after = files.read(tmp_path / "model.sgmm", "model")
    assert after.facts == before.facts
    assert after.arrays.keys() == before.arrays.keys()
    for name in after.arrays.keys() - {"ledger_stamps"}:  # they tell when the rows were written
        np.testing.assert_array_equal(after.arrays[name], before.arrays[name])


@pytest.mark.parametrize("theirs", ["rows.zarr", "model.sgmm"])
def test_demo_leaves_what_is_not_its_own(tmp_path: Path, theirs: str) -> None:
    if theirs == "rows.zarr":
        zarr.create_array(str(tmp_path / theirs), data=np.ones((3, 2)))
    else:
        (tmp_path / theirs).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    assert f"holds {theirs}, which the demo did not write. Give it another folder." in error_of("demo", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_demo_without_matplotlib_ends_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = succeed("demo", tmp_path, "--rows", 3_000)
    assert "No picture: " in result.stderr
    assert "pip install streamgmm[plot]" in result.stderr
    assert (tmp_path / "model.sgmm").exists()
    assert "mixture.png" not in result.output
