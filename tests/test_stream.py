"""Streams of batches: any iterator, in the memory of one batch, with checkpoints."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import assert_identical, blobs

from streamgmm import GaussianMixture, load
from streamgmm.errors import DataError, DataTypeError, FileFormatError, ParameterError


def batches(n: int = 12) -> Iterator[np.ndarray]:
    return (blobs(150, seed=seed) for seed in range(n))


def test_a_stream_is_its_batches_one_by_one():
    streamed, by_hand = GaussianMixture(3, random_state=0), GaussianMixture(3, random_state=0)
    heard = []
    assert streamed.fit_stream(batches(), on_batch=heard.append) is streamed
    for batch in batches():
        by_hand.partial_fit(batch)
    assert_identical(streamed, by_hand)
    assert streamed.n_stream_ == 12
    assert [report.n_rows for report in heard] == [150] * 12
    assert [report.name for report in heard] == [str(i) for i in range(12)]
    assert streamed.n_rows_ == 1800


def test_items_may_be_lazy_or_have_weights():
    rows, weights = blobs(400), np.arange(400.0) % 3
    stream = [da.from_array(rows, chunks=(90, 3)), (rows, weights), rows.astype("float32")]
    model = GaussianMixture(3, random_state=0).fit_stream(stream)
    by_hand = GaussianMixture(3, random_state=0).partial_fit(stream[0])
    by_hand.partial_fit(rows, sample_weight=weights).partial_fit(stream[2])
    assert_identical(model, by_hand)


def test_a_stream_that_breaks_off_leaves_its_checkpoint_and_goes_on_from_there(tmp_path):
    def broken() -> Iterator[np.ndarray]:
        yield from itertools.islice(batches(), 7)
        raise ConnectionError("the cable was pulled")

    path = tmp_path / "model.sgmm"
    with pytest.raises(ConnectionError, match="the cable was pulled"):
        GaussianMixture(3, random_state=0).fit_stream(broken(), checkpoint=path)
    model = load(path)
    assert model.n_stream_ == 7
    model.fit_stream(itertools.islice(batches(), model.n_stream_, None), checkpoint=path)
    assert_identical(model, GaussianMixture(3, random_state=0).fit_stream(batches()))
    assert_identical(model, load(path))
    assert load(path).n_stream_ == 12


def test_a_bad_batch_is_named_and_those_before_it_stay_learned(tmp_path):
    bad = blobs(150)
    bad[3, 1] = np.nan
    model = GaussianMixture(3, random_state=0)
    with pytest.raises(DataError, match="Batch 4 of the stream: Input contains NaN in row 3, column 1"):
        model.fit_stream([*batches(4), bad, *batches(2)], checkpoint=tmp_path / "model.sgmm")
    assert_identical(model, GaussianMixture(3, random_state=0).fit_stream(batches(4)))
    assert load(tmp_path / "model.sgmm").n_stream_ == model.n_stream_ == 4


def test_a_batch_of_another_type_or_a_bad_parameter_is_named_too():
    model = GaussianMixture(3, random_state=0, reg_covar=0.0).fit(blobs())
    with pytest.raises(DataTypeError, match=r"Batch 1 of the stream: .*complex"):
        model.fit_stream([blobs(150), da.ones((150, 3), dtype=complex)])
    with pytest.raises(ParameterError, match=r"Batch 1 of the stream: n_components must be"):
        model.set_params(n_components=0).fit_stream(batches(2))


@pytest.mark.parametrize(
    "thing", ["rows.zarr", Path("rows.zarr"), blobs(9), da.ones((6, 3)), 3, None, {}], ids=lambda x: type(x).__name__
)
def test_a_single_batch_is_no_stream(thing):
    with pytest.raises(DataTypeError, match=rf"batches must be an iterator .*a {type(thing).__name__} was given"):
        GaussianMixture(3).fit_stream(thing)


def test_a_checkpoint_that_cannot_be_written_is_noticed_first_and_hides_no_error(tmp_path):
    folder = tmp_path / "folder"
    model, path = GaussianMixture(3, random_state=0), folder / "model.sgmm"
    with pytest.raises(FileFormatError, match="There is no folder"):
        model.fit_stream(batches(), checkpoint=path)
    with pytest.raises(FileFormatError, match="There is no folder"):
        model.update(blobs(), batch_id="x", checkpoint=path)
    assert model.n_stream_ == 0
    folder.mkdir()

    def going() -> Iterator[np.ndarray]:
        yield from batches(3)
        folder.rmdir()
        raise ConnectionError("the cable was pulled")

    with pytest.raises(ConnectionError, match="the cable was pulled") as caught:
        model.fit_stream(going(), checkpoint=path)
    assert "could not be saved: There is no folder" in caught.value.__notes__[0]
    assert model.n_stream_ == 3


def test_an_error_in_a_later_unit_leaves_those_before_it_in_the_checkpoint(tmp_path):
    rows = blobs(600)
    rows[450, 1] = np.nan
    zarr.create_array(tmp_path / "rows.zarr", data=rows, chunks=(100, 3))
    model = GaussianMixture(3, random_state=0).fit(blobs(seed=1))
    with pytest.raises(DataError, match="NaN in row 450"):
        model.update(tmp_path / "rows.zarr", flush=True, checkpoint=tmp_path / "model.sgmm")
    assert_identical(load(tmp_path / "model.sgmm"), model)
    assert load(tmp_path / "model.sgmm").n_rows_ == 1600


def test_a_stream_of_nothing_learns_nothing(tmp_path):
    model = GaussianMixture(3).fit_stream([], checkpoint=tmp_path / "model.sgmm")
    assert model.n_stream_ == 0
    assert not (tmp_path / "model.sgmm").exists()


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("streamgmm.updating.CHECKPOINT_SECONDS", 0.0)
    seen = []

    def looking() -> Iterator[np.ndarray]:
        for batch in batches(5):
            seen.append(load(tmp_path / "model.sgmm").n_stream_ if seen or (tmp_path / "model.sgmm").exists() else 0)
            yield batch

    GaussianMixture(3, random_state=0).fit_stream(looking(), checkpoint=tmp_path / "model.sgmm")
    assert seen == [0, 1, 2, 3, 4]


#: Prints the peak of the resident memory, in kB, of each tenth of a stream; the kernel begins a new peak after each.
STREAM = """
import sys
import numpy as np
from streamgmm import GaussianMixture

n_batches, size = int(sys.argv[1]), 10_000
rng = np.random.default_rng(0)
centres = 4.0 * rng.standard_normal((8, 5))
count = 0

def batches():
    for _ in range(n_batches):
        yield centres[rng.integers(8, size=size)] + rng.standard_normal((size, 5))

def look(report):
    global count
    count += 1
    if count % (n_batches // 10) == 0:
        with open("/proc/self/status") as file:
            print(next(line for line in file if line.startswith("VmHWM")).split()[1])
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

model = GaussianMixture(8, random_state=0).fit_stream(batches(), on_batch=look)
assert model.n_rows_ == n_batches * size
"""


def test_memory_stays_flat(request):
    """Ten million rows: the last tenth takes no more than the first, within 5 %. A million in the short form."""
    n_batches = 1000 if request.config.getoption("--long") else 100
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(n_batches)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 10
    print(f"{n_batches * 10_000:,} rows: peak {sizes[0]:,} kB in the first tenth, {sizes[-1]:,} kB in the last")
    assert sizes[-1] <= 1.05 * sizes[0], sizes
