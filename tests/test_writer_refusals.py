"""What the writer refuses: targets that do not fit, values that do not fit, and paths where something stands."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from test_writer import Grid, counting_rows, left_in
from zarr.storage import MemoryStore

from streamgmm import write_rows
from streamgmm.errors import DataError, DataTypeError, ParameterError

# -- targets and values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(102,), (104,), (103, 1), (2, 103)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ParameterError, match=r"The target has shape \(.*, but the rows have \(103,\)"):
        write_rows(counting_rows((40, 40, 23))[0], Grid(17).array(MemoryStore(), shape))


def test_a_target_that_is_open_for_reading_is_refused(tmp_path):
    Grid(17).array(str(tmp_path / "t.zarr"), (103,))
    target = zarr.open_array(str(tmp_path / "t.zarr"), mode="r")
    with pytest.raises(ParameterError, match=r"open for reading only. Open it with mode='r\+'"):
        write_rows(counting_rows((40, 40, 23))[0], target)
    assert target.nchunks_initialized == 0


@pytest.mark.parametrize("theirs", ["i8", "i4", "u1", "bool"])
def test_fractions_into_whole_numbers_are_refused(theirs):
    target = Grid(17).array(MemoryStore(), (103,), theirs, fill_value=0)
    rows = counting_rows((40, 40, 23))[0] * 0.5
    with pytest.raises(ParameterError, match=f"holds {target.dtype}, which cannot take values of float64"):
        write_rows(rows, target)
    assert target.nchunks_initialized == 0


@pytest.mark.parametrize("theirs", ["i1", "u1", "i2", "u4", "f4", "f8"])
def test_labels_into_any_type_that_holds_them(theirs):
    target, (labels, values) = Grid(17).array(MemoryStore(), (103,), theirs, fill_value=9), counting_rows((40, 40, 23))
    write_rows(labels, target)
    np.testing.assert_array_equal(target[:], values)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("grid", [Grid(100), Grid(37), Grid(1_000)])
def test_a_label_that_does_not_fit_is_named(grid, scheduler):
    """300 components have labels up to 299."""
    labels = da.from_array(np.where(np.arange(500) == 432, 299, 100), chunks=100)
    target = grid.array(MemoryStore(), (500,), "i1")
    message = r"row 432 is 299, which int8 cannot hold. Give a target of a wider type"
    with dask.config.set(scheduler=scheduler), pytest.raises(DataError, match=message):
        write_rows(labels, target)


@pytest.mark.parametrize("value", [-1, 256])
def test_a_label_outside_an_unsigned_type_is_named(value):
    labels = da.from_array(np.where(np.arange(500) == 432, value, 100), chunks=100)
    with pytest.raises(DataError, match=f"row 432 is {value}, which uint8 cannot hold"):
        write_rows(labels, Grid(37).array(MemoryStore(), (500,), "u1", fill_value=0))


def test_a_number_beyond_a_narrow_float_is_named():
    rows = da.from_array(np.where(np.arange(500) == 432, -1e300, -2.5), chunks=100)
    target = Grid(37).array(MemoryStore(), (500,), "f4")
    with pytest.raises(DataError, match=r"row 432 is -1e\+300, which float32 cannot hold"):
        write_rows(rows, target)


def test_infinite_and_missing_values_are_values():
    values = np.array([np.inf, -np.inf, np.nan, 0.1, -0.0])
    for dtype in ("f8", "f4"):
        target = Grid(2).array(MemoryStore(), (5,), dtype)
        write_rows(da.from_array(values, chunks=3), target)
        np.testing.assert_array_equal(target[:], values.astype(dtype))


@pytest.mark.parametrize("dtype", ["bool", "i1", "u1", "u8", "f4", "f8"])
def test_a_new_array_has_the_type_of_the_rows(tmp_path, dtype):
    values = (np.arange(103) % 2).astype(dtype)
    written = write_rows(da.from_array(values, chunks=40), tmp_path / "t.zarr", chunk_rows=17)
    assert (written.dtype, written.nchunks_initialized) == (np.dtype(dtype), 7)
    np.testing.assert_array_equal(written[:], values)


# -- new arrays and their paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "group", "file", "folder"])
def test_what_stands_at_the_path_is_kept(tmp_path, kind):
    path = tmp_path / "t.zarr"
    if kind == "array":
        zarr.create_array(str(path), data=np.arange(5))
    elif kind == "group":
        zarr.open_group(str(path), mode="w").create_array("a", data=np.arange(5))
    elif kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        (path / "thesis").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    rows = counting_rows((40, 40, 23))[0]
    with pytest.raises(ParameterError, match=r"t\.zarr exists already. Set overwrite=True to replace it"):
        write_rows(rows, path)
    if kind != "array":
        with pytest.raises(ParameterError, match=r"t\.zarr is not a zarr array, so it is not replaced"):
            write_rows(rows, path, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_array_is_replaced_when_told(tmp_path):
    path, (rows, values) = tmp_path / "t.zarr", counting_rows((40, 40, 23))
    zarr.create_array(str(path), data=np.arange(500.0), chunks=(1,))
    written = write_rows(rows, path, overwrite=True)
    assert (written.shape, written.dtype) == ((103,), np.dtype("i8"))
    np.testing.assert_array_equal(written[:], values)
    assert left_in(tmp_path) == ["t.zarr"]
    assert len(left_in(path / "c")) == 3


def test_a_link_to_an_array_leaves_nothing_behind_when_replaced(tmp_path):
    """Whether the link or what it names is replaced: the rows are at the path, and beside it there is nothing new."""
    zarr.create_array(str(tmp_path / "real.zarr"), data=np.arange(5))
    (tmp_path / "t.zarr").symlink_to(tmp_path / "real.zarr")
    rows, values = counting_rows((40, 40, 23))
    np.testing.assert_array_equal(write_rows(rows, tmp_path / "t.zarr", overwrite=True)[:], values)
    assert left_in(tmp_path) == ["real.zarr", "t.zarr"]


@pytest.mark.parametrize(("chunk_rows", "shard_rows"), [(10, 15), (10, 5), (None, 60)])
def test_a_shard_is_made_of_whole_chunks(tmp_path, chunk_rows, shard_rows):
    message = f"shard_rows={shard_rows} is not a multiple of the {chunk_rows or 40} rows of a chunk"
    with pytest.raises(ParameterError, match=message):
        write_rows(counting_rows((40, 40, 23))[0], tmp_path / "t.zarr", chunk_rows=chunk_rows, shard_rows=shard_rows)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("chunk_rows", [0, -1])
def test_a_chunk_has_at_least_one_row(tmp_path, chunk_rows):
    with pytest.raises(ParameterError, match=f"chunk_rows.*{chunk_rows}"):
        write_rows(counting_rows((40, 40, 23))[0], tmp_path / "t.zarr", chunk_rows=chunk_rows)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("target", ["path", "open"])
def test_unknown_chunk_sizes_are_refused(tmp_path, target):
    rows = counting_rows((40, 40, 23))[0]
    place = tmp_path / "t.zarr" if target == "path" else Grid(17).array(MemoryStore(), (103,))
    with pytest.raises(DataError, match=r"unknown chunk sizes.*compute_chunk_sizes\(\)"):
        write_rows(rows[rows >= 0], place)
    assert left_in(tmp_path) == []
    found = write_rows(rows[rows >= 0].compute_chunk_sizes(), place)
    np.testing.assert_array_equal(found[:], np.arange(103))


def test_a_url_is_no_path(tmp_path, monkeypatch):
    """It would become a folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=r"s3://bucket/labels\.zarr"):
        write_rows(counting_rows((40, 40, 23))[0], "s3://bucket/labels.zarr")
    assert left_in(tmp_path) == []


def test_rows_in_memory_are_refused(tmp_path):
    """Rows in memory give results in memory, which zarr writes without help."""
    with pytest.raises(DataTypeError, match="ndarray"):
        write_rows(np.arange(103), tmp_path / "t.zarr")  # type: ignore[arg-type]
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("theirs", ["f4", "f2"])
def test_whole_numbers_that_a_narrow_fraction_rounds_are_refused(theirs):
    labels = da.from_array(np.full(10, 2**24 + 1), chunks=5)
    with pytest.raises(DataError, match=r"is 16777217, which float(16|32) cannot hold"):
        write_rows(labels, Grid(4).array(MemoryStore(), (10,), theirs, fill_value=0))


def test_a_target_of_complex_numbers_is_refused():
    target = zarr.create_array(MemoryStore(), shape=(10,), chunks=(4,), dtype="c16")
    with pytest.raises(ParameterError, match="cannot take values of int64"):
        write_rows(da.zeros(10, dtype=int, chunks=5), target)


@pytest.mark.parametrize("target", [None, 3, zarr.group(MemoryStore())])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(DataTypeError, match="Give an open zarr array, or the path of a new one"):
        write_rows(da.zeros(10, chunks=5), target)


@pytest.mark.parametrize("size", [0, -1, 2.5, "100", True])
@pytest.mark.parametrize("name", ["chunk_rows", "shard_rows"])
def test_rows_of_a_chunk_are_a_whole_number(tmp_path, name, size):
    with pytest.raises(ParameterError, match=f"{name} must be a positive whole number of rows, but it is {size!r}"):
        write_rows(da.zeros(10, chunks=5), tmp_path / "t.zarr", **{name: size})


def test_an_open_target_has_its_chunks():
    with pytest.raises(ParameterError, match="leave chunk_rows and shard_rows out"):
        write_rows(da.zeros(10, chunks=5), Grid(4).array(MemoryStore(), (10,), "f8"), chunk_rows=5)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="There are 0 rows to write"):
        write_rows(da.zeros(0, chunks=5), tmp_path / "t.zarr")


def test_an_array_of_another_kind_is_not_replaced(tmp_path):
    """It might be the rows themselves."""
    zarr.create_array(tmp_path / "rows.zarr", data=np.ones((10, 3)))
    with pytest.raises(ParameterError, match=r"has shape \(10, 3\), so it holds no results of shape \(10,\)"):
        write_rows(da.zeros(10, chunks=5), tmp_path / "rows.zarr", overwrite=True)
    assert (zarr.open_array(tmp_path / "rows.zarr")[...] == 1).all()
