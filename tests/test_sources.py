"""Where rows come from: every source hands out every row once and in order, whatever it is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import write_zarr
from hypothesis import given
from hypothesis import strategies as st

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, DataTypeError, ParameterError, SourceError, StreamGMMError
from streamgmm.protocols import Source
from streamgmm.sources import is_store, with_weights
from streamgmm.sources.grid import MEMORY_BLOCK_BYTES, STORE_BLOCK_BYTES, canonical_block_rows

N, D = 101, 5


def plain_rows(n: int = N, d: int = D) -> np.ndarray:
    return np.arange(n * d, dtype=np.float64).reshape(n, d)


def rows_of(block: Any) -> np.ndarray:
    return np.concatenate([piece.rows for piece in block.pieces()])


# -- the contract ------------------------------------------------------------------------------------------------


class SourceContract:
    """What every source promises. ``open`` makes one of rows (N, D) with the block_rows given."""

    in_memory = True
    weights: np.ndarray | None = None

    def open(self, folder: Path, rows: np.ndarray, block_rows: int | None) -> Source:
        raise NotImplementedError

    @pytest.fixture(params=[3, 20, 50, None])
    def source(self, request, tmp_path):
        return self.open(tmp_path, plain_rows(), request.param)

    def test_describes_its_rows(self, source, tmp_path):
        assert (source.n_rows, source.n_features) == (N, D)
        assert source.dtype == np.float64
        assert source.in_memory is self.in_memory
        assert source.grid_rows >= 1
        assert source.name
        assert str(tmp_path.parent) not in source.name  # a full path may hold a credential

    def test_blocks_hand_out_every_row_once_and_in_order(self, source):
        blocks = source.blocks()
        assert [block.start for block in blocks] == list(range(0, N, source.block_rows))
        assert [block.stop for block in blocks] == [*(block.start for block in blocks[1:]), N]
        assert all(block.n_features == D for block in blocks)
        assert np.array_equal(np.concatenate([rows_of(block) for block in blocks]), plain_rows())

    def test_pieces_keep_within_the_grid(self, source):
        for block in source.blocks():
            row = block.start
            for piece in block.pieces():
                stop = row + len(piece.rows)
                if not source.in_memory:
                    assert row // source.grid_rows == (stop - 1) // source.grid_rows
                row = stop
            assert row == block.stop

    def test_any_block_equals_its_rows(self, tmp_path):
        source = self.open(tmp_path, plain_rows(), 10)

        @given(st.integers(0, N - 1), st.integers(1, N))
        def law(start: int, length: int) -> None:
            stop = min(start + length, N)
            assert np.array_equal(rows_of(source.block(start, stop)), plain_rows()[start:stop])

        law()

    def test_a_block_can_be_read_again(self, source):
        block = source.blocks()[0]
        assert np.array_equal(rows_of(block), rows_of(block))

    def test_weights_go_with_their_rows(self, source):
        for block in source.blocks():
            row = block.start
            for piece in block.pieces():
                if self.weights is None:
                    assert piece.weights is None
                else:
                    assert np.array_equal(piece.weights, self.weights[row : row + len(piece.rows)])
                row += len(piece.rows)

    def test_an_open_source_passes_through(self, source):
        assert is_store(source)
        assert open_source(source) is source
        with pytest.raises(
            ParameterError, match="This source is open already; say block_rows and nan_policy where it is opened"
        ):
            open_source(source, block_rows=3)

    def test_places_are_named(self, source):
        assert source.block(0, N).locate(77, 4).startswith("row 77, column 4")

    def test_values_that_are_not_finite_are_named(self, tmp_path):
        rows = plain_rows()
        rows[61, 4] = np.nan
        with pytest.raises(DataError, match="Input contains NaN in row 61, column 4"):
            GaussianMixture().fit(self.open(tmp_path, rows, 10))

    def test_fits_like_the_array(self, tmp_path):
        rows = np.random.default_rng(0).normal(size=(N, D))
        model = GaussianMixture().fit(self.open(tmp_path, rows, 10))
        assert model.means_[0] == pytest.approx(np.average(rows, axis=0, weights=self.weights), abs=1e-12)
        covariance = np.cov(rows.T, bias=True, aweights=self.weights) + 1e-6 * np.eye(D)
        assert model.covariances_[0] == pytest.approx(covariance, abs=1e-12)


class TestMemory(SourceContract):
    def open(self, folder, rows, block_rows):
        return open_source(rows, block_rows=block_rows)


class TestFortranOrder(SourceContract):
    def open(self, folder, rows, block_rows):
        return open_source(np.asfortranarray(rows), block_rows=block_rows)


class TestNotContiguous(SourceContract):
    def open(self, folder, rows, block_rows):
        wide = np.zeros((2 * N, 3 * D))
        wide[::-2, 1::3] = rows
        return open_source(wide[::-2, 1::3], block_rows=block_rows)


class TestReadOnly(SourceContract):
    def open(self, folder, rows, block_rows):
        rows.flags.writeable = False
        return open_source(rows, block_rows=block_rows)


class TestMemmap(SourceContract):
    def open(self, folder, rows, block_rows):
        np.save(folder / "rows.npy", rows)
        return open_source(np.load(folder / "rows.npy", mmap_mode="r"), block_rows=block_rows)


class TestZarrPath(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        return open_source(write_zarr(folder, rows, 20), block_rows=block_rows)


class TestZarrString(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        return open_source(str(write_zarr(folder, rows, N)), block_rows=block_rows)


class TestZarrArray(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        return open_source(zarr.open_array(write_zarr(folder, rows, 7), mode="r"), block_rows=block_rows)


class TestZarrShards(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        return open_source(write_zarr(folder, rows, 5, 20), block_rows=block_rows)


class TestZarrColumnsSplit(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        array = zarr.create_array(folder / "split.zarr", shape=rows.shape, chunks=(20, 2), dtype=rows.dtype)
        array[...] = rows
        return open_source(array, block_rows=block_rows)


class TestZarrGroup(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        group = zarr.open_group(folder / "group.zarr", mode="w")
        array = group.create_array("deep/rows", shape=rows.shape, chunks=(20, D), dtype=rows.dtype)
        array[...] = rows
        return open_source(group["deep"], array="rows", block_rows=block_rows)


class TestZarrVersionTwo(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        array = zarr.create_array(
            folder / "two.zarr", shape=rows.shape, chunks=(20, D), dtype=rows.dtype, zarr_format=2
        )
        array[...] = rows
        return open_source(folder / "two.zarr", block_rows=block_rows)


class TestZarrInMemoryStore(SourceContract):
    in_memory = False

    def open(self, folder, rows, block_rows):
        array = zarr.create_array({}, shape=rows.shape, chunks=(20, D), dtype=rows.dtype)
        array[...] = rows
        return open_source(array, block_rows=block_rows)


class TestWeightedMemory(TestMemory):
    weights = np.linspace(0.0, 3.0, N)

    def open(self, folder, rows, block_rows):
        return with_weights(super().open(folder, rows, block_rows), self.weights)


class TestWeightedZarr(TestZarrShards):
    weights = np.arange(N, dtype=np.float64) % 4

    def open(self, folder, rows, block_rows):
        return with_weights(super().open(folder, rows, block_rows), list(self.weights))


# -- canonical blocks --------------------------------------------------------------------------------------------


@given(st.integers(1, 10**7), st.integers(1, 4_000))
def test_canonical_blocks_are_the_nearest_multiple_of_the_grid(grid_rows, d):
    for target in (STORE_BLOCK_BYTES, MEMORY_BLOCK_BYTES):
        rows = canonical_block_rows(grid_rows, d, target)
        assert rows >= grid_rows
        assert rows % grid_rows == 0
        away = abs(8 * d * rows - target)
        assert away <= abs(8 * d * (rows + grid_rows) - target)
        assert rows == grid_rows or away <= abs(8 * d * (rows - grid_rows) - target)


@pytest.mark.parametrize(
    ("grid_rows", "d", "expected"), [(1, 1, 4_194_304), (65_536, 8, 524_288), (100_000, 8, 500_000), (10**7, 8, 10**7)]
)
def test_blocks_of_a_store_in_numbers(grid_rows, d, expected):
    assert canonical_block_rows(grid_rows, d, 32 * 2**20) == expected


def test_blocks_depend_on_the_source_alone(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(10**9, 8), chunks=(1_000, 8), shards=(50_000, 8), dtype="u1")
    source = open_source(array, missing_chunks="fill")
    assert (source.grid_rows, source.block_rows) == (50_000, 500_000)
    in_memory = {n: open_source(np.broadcast_to(0.0, (n, 8))).block_rows for n in (3, 100_000, 10**7)}
    assert in_memory == {3: 2**18 // 64, 100_000: 100_000 // 8, 10**7: 2**22 // 64}


@pytest.mark.parametrize("block_rows", [0, -3, 2.5, True, "many"])
def test_block_rows_must_be_a_positive_whole_number(block_rows):
    with pytest.raises(ParameterError, match="block_rows must be a positive whole number of rows or None"):
        open_source(plain_rows(), block_rows=block_rows)


def test_block_rows_may_be_a_numpy_integer():
    assert open_source(plain_rows(), block_rows=np.int64(7)).block_rows == 7


# -- what can be rows --------------------------------------------------------------------------------------------

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">f4", ">i2"]


@pytest.mark.parametrize("kind", ["memory", "zarr"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_equals_its_float64_copy(tmp_path, dtype, kind):
    rng = np.random.default_rng(1)
    rows = (rng.integers(0, 2 if dtype == "?" else 100, size=(400, 3)) / (3 if "f" in dtype else 1)).astype(dtype)

    def fit(x: np.ndarray, name: str) -> GaussianMixture:
        source = open_source(x if kind == "memory" else write_zarr(tmp_path, x, 64, name=name), block_rows=128)
        assert source.dtype == x.dtype.newbyteorder("=") or source.dtype == x.dtype
        return GaussianMixture(1, random_state=0).fit(source)

    found, expected = fit(rows, "a"), fit(rows.astype(np.float64), "b")
    assert np.array_equal(found.means_, expected.means_)
    assert np.array_equal(found.covariances_, expected.covariances_)
    assert found.lower_bounds_ == expected.lower_bounds_
    assert np.array_equal(found.score_samples(rows), expected.score_samples(rows.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["c16", "U3", "O", "M8[s]", "m8[s]", "V4", np.longdouble])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(DataTypeError, match="Rows must be real numbers of at most 64 bits"):
        open_source(np.zeros((3, 2), dtype=dtype))


def test_complex_zarr_arrays_are_refused(tmp_path):
    array = zarr.create_array(tmp_path / "c.zarr", shape=(3, 2), dtype="c16")
    with pytest.raises(DataTypeError, match=r"c\.zarr holds values of type complex128"):
        open_source(array)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((), "has 0 dimension"),
        ((5,), r"has 1 dimension\(s\) \(5,\), but rows need two.*reshape\(-1, 1\)"),
        ((2, 3, 4), r"has 3 dimension\(s\) \(2, 3, 4\)"),
        ((0, 3), r"has 0 rows \(shape=\(0, 3\)\)"),
        ((3, 0), r"0 feature\(s\) \(shape=\(3, 0\)\)"),
    ],
)
def test_other_shapes_are_refused(tmp_path, shape, words):
    with pytest.raises(DataError, match=words):
        open_source(np.zeros(shape))
    with pytest.raises(DataError, match=words):
        open_source(zarr.create_array(tmp_path / "a.zarr", shape=shape, dtype="f8"))


@pytest.mark.parametrize("x", [None, 3, [[1.0], [2.0]], {"a": 1}, object()])
def test_other_things_are_refused(x):
    assert not is_store(x)
    with pytest.raises(DataTypeError, match=f"Rows cannot be read from a {type(x).__name__}. Give a path"):
        open_source(x)


@pytest.mark.parametrize(
    "options", [{"array": "x"}, {"storage_options": {"key": "k"}}, {"missing_chunks": "fill"}, {"decode": "cf"}]
)
def test_options_of_stores_are_refused_for_arrays(options):
    with pytest.raises(ParameterError, match="array, storage_options, missing_chunks and decode describe a zarr store"):
        open_source(plain_rows(), **options)


# -- paths and groups --------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path) -> zarr.Group:
    group = zarr.open_group(tmp_path / "group.zarr", mode="w")
    for name in ("rows", "other"):
        group.create_array(name, shape=(N, D), dtype="f8")[...] = plain_rows()
    group.create_group("folder")
    return group


def test_a_group_without_a_name_says_what_it_holds(tmp_path, group):
    for x in (group, tmp_path / "group.zarr", str(tmp_path / "group.zarr")):
        with pytest.raises(SourceError, match=r"group of arrays \['other', 'rows'\]. Say which one with array=NAME"):
            open_source(x)


@pytest.mark.parametrize("name", ["nothing", "folder"])
def test_a_group_without_that_array_says_what_it_holds(group, name):
    with pytest.raises(SourceError, match=rf"has no array '{name}'; it holds \['other', 'rows'\]"):
        open_source(group, array=name)


def test_an_array_is_no_group(group):
    with pytest.raises(SourceError, match=r"group\.zarr/rows is an array, not a group, so array='rows' names nothing"):
        open_source(group["rows"], array="rows")


def test_a_group_s_array_by_path_and_name(tmp_path, group):
    source = open_source(tmp_path / "group.zarr", array="rows")
    assert source.name == "group.zarr/rows"
    assert np.array_equal(rows_of(source.block(0, N)), plain_rows())


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"no zarr array or group that can be opened at '.*nowhere\.zarr'"):
        open_source(tmp_path / "nowhere.zarr")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_store_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n")
    with pytest.raises(SourceError, match=r"no zarr array or group that can be opened at '.*rows.csv'"):
        open_source(tmp_path / "rows.csv")


def test_errors_of_sources_are_the_builtin_ones_too():
    assert issubclass(SourceError, OSError)
    assert issubclass(DataError, ValueError)
    assert issubclass(DataTypeError, TypeError)
    assert all(issubclass(error, StreamGMMError) for error in (SourceError, DataError, DataTypeError))


# -- places and damage -------------------------------------------------------------------------------------------


def test_places_in_a_zarr_array(tmp_path):
    split = zarr.create_array(tmp_path / "split.zarr", data=np.ones((N, D)), chunks=(20, 2))
    shards = zarr.create_array(tmp_path / "shards.zarr", data=np.ones((N, D)), chunks=(5, D), shards=(20, D))
    place = open_source(split).block(0, N).locate(77, 4)
    assert place == "row 77, column 4 (chunk 3/2 of split.zarr)"
    assert open_source(shards).block(0, N).locate(77, 4) == "row 77, column 4 (shard 3/0 of shards.zarr)"
    assert with_weights(open_source(split), np.ones(N)).block(0, N).locate(77, 4) == place
    assert open_source(plain_rows()).block(0, N).locate(77, 4) == "row 77, column 4"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shards", [None, (20, D)])
def test_a_truncated_chunk_is_named(tmp_path, compressed, shards):
    path = tmp_path / "rows.zarr"
    array = zarr.create_array(
        path, shape=(N, D), chunks=(20 if shards is None else 5, D), shards=shards, dtype="f8",
        compressors="auto" if compressed else None,
    )  # fmt: skip
    array[...] = plain_rows()
    chunk = path / "c" / "3" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    unit = "chunk" if shards is None else "shard"
    with pytest.raises(SourceError, match=rf"from row 60, column 0 \({unit} 3/0 of rows.zarr\) on could not be read"):
        GaussianMixture().fit(open_source(path, block_rows=40))


def test_a_truncated_column_chunk_is_named(tmp_path):
    path = tmp_path / "rows.zarr"
    array = zarr.create_array(path, shape=(N, D), chunks=(20, 2), dtype="f8")
    array[...] = plain_rows()
    chunk = path / "c" / "3" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(SourceError, match=r"chunk 3/1 of rows\.zarr"):
        GaussianMixture().fit(path)


def test_a_value_that_is_not_finite_is_named_with_its_chunk(tmp_path):
    rows = plain_rows()
    rows[61, 4] = -np.inf
    path = write_zarr(tmp_path, rows, 20)
    with pytest.raises(DataError, match=r"infinity in row 61, column 4 \(chunk 3/0 of rows.zarr\)"):
        GaussianMixture().fit(open_source(path, block_rows=20))


# -- weights -----------------------------------------------------------------------------------------------------


def test_no_weights_leave_a_source_as_it_is():
    source = open_source(plain_rows())
    assert with_weights(source, None) is source


@pytest.mark.parametrize("n", [N - 1, N + 1])
def test_weights_of_another_length_are_refused(n):
    with pytest.raises(DataError, match=rf"sample_weight has shape \({n},\), but the array has {N} rows"):
        with_weights(open_source(plain_rows()), np.ones(n))


@pytest.mark.parametrize("shape", [(N, 1), (N, 2), (0,), ()])
def test_weights_of_another_shape_are_refused(shape):
    words = rf"sample_weight has shape {re.escape(str(shape))}, but one weight for each row of the array is expected"
    with pytest.raises(DataError, match=words):
        with_weights(open_source(plain_rows()), np.ones(shape))


@pytest.mark.parametrize("bad", [-1.0, -1e-300, np.nan, np.inf])
def test_weights_without_meaning_are_refused(bad):
    weights = np.ones(N)
    weights[[41, 77]] = bad
    with pytest.raises(DataError, match=f"sample_weight of row 41 is {bad}"):
        with_weights(open_source(plain_rows()), weights)


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(StreamGMMError, match="sample_weight"):
        with_weights(open_source(plain_rows()), ["heavy"] * N)


@pytest.mark.parametrize("n", [100_000, 100_001, 100_007, 29_137 * 8 // 3])
def test_an_array_in_memory_is_cut_into_eight_alike_blocks(n: int) -> None:
    """Not into eight and one of a few rows."""
    sizes = [block.stop - block.start for block in open_source(np.zeros((n, 8))).blocks()]
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) < 8
