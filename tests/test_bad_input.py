"""Rows and weights that cannot be right: each kind is refused at the door, in words that name it and its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import scipy.sparse as sparse
import zarr
from mixtures import blobs
from refusals import NO_NUMBERS, ROWS, Bad, fit_refuses, model, refuses, stored, table
from sklearn.exceptions import NotFittedError
from zarr.storage import MemoryStore

from streamgmm import GaussianMixture
from streamgmm.errors import DataError, DataTypeError, SourceError

EXACT = 2**53

pytestmark = [
    # zarr says of texts in version 3 stores that their layout may change
    pytest.mark.filterwarnings("ignore:The data type .* does not have a Zarr V3 specification"),
    # tables are given to models of rows without names
    pytest.mark.filterwarnings("ignore:X has feature names"),
]


def never_written(*shape: int) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        zarr.create_array(str(folder / "e.zarr"), shape=shape, dtype="f8")
        return folder / "e.zarr"

    return made


def at(value: Any, row: int = 77, column: int = 1, dtype: Any = None) -> np.ndarray:
    """The rows with one value changed."""
    rows = ROWS.copy() if dtype is None else np.arange(600).reshape(200, 3).astype(dtype)
    rows[row, column] = value
    return rows


def table_of(**columns: Any) -> Callable[[Path], Any]:
    return lambda folder: pytest.importorskip("pandas").DataFrame(columns)


# -- rows --------------------------------------------------------------------------------------------------------

TOO_LARGE = r"beyond 2\*\*53, so float64 cannot hold it\. Subtract an offset"

bad_types = table(
    (
        "object holding text",
        np.array([["a", "b", "c"]] * 50, object),
        DataError,
        "could not convert string to float: 'a'",
    ),
    ("text", ROWS.astype(str), DataError, "not compatible with arrays of bytes/strings"),
    ("bytes", ROWS.astype("S"), DataError, "not compatible with arrays of bytes/strings"),
    ("lists of text", [["a", "b", "c"]] * 5, DataError, "not compatible with arrays of bytes/strings"),
    ("records", np.zeros((50, 3), [("a", "f8")]), DataError, "not compatible with arrays of bytes/strings"),
    ("complex", ROWS + 0j, DataError, "Complex data not supported"),
    ("dates", np.zeros((50, 3), "M8[ns]"), DataTypeError, rf"type datetime64\[ns\]\. {NO_NUMBERS}"),
    ("durations", np.zeros((50, 3), "m8[s]"), DataTypeError, rf"type timedelta64\[s\]\. {NO_NUMBERS}"),
    ("long double", ROWS.astype(np.longdouble), DataTypeError, NO_NUMBERS),
    ("stored complex", stored(ROWS + 0j), DataTypeError, rf"type complex128\. {NO_NUMBERS}"),
    ("stored text", stored(ROWS.astype("U5")), DataTypeError, rf"type <U5\. {NO_NUMBERS}"),
    ("stored bytes", stored(ROWS.astype("S5")), DataTypeError, rf"type \|S5\. {NO_NUMBERS}"),
    ("stored dates", stored(np.zeros((50, 3), "M8[s]")), DataTypeError, rf"type datetime64\[s\]\. {NO_NUMBERS}"),
    ("stored durations", stored(np.zeros((50, 3), "m8[s]")), DataTypeError, rf"type timedelta64\[s\]\. {NO_NUMBERS}"),
    ("dask of complex", da.from_array(ROWS + 0j), DataTypeError, rf"dask array holds .*complex128\. {NO_NUMBERS}"),
    ("dask of objects", da.from_array(ROWS.astype(object), chunks=50), DataTypeError, rf"type object\. {NO_NUMBERS}"),
    ("dask of dates", da.zeros((50, 3), dtype="M8[s]"), DataTypeError, NO_NUMBERS),
    ("a table of text", table_of(a=["x"] * 50, b=["y"] * 50, c=["z"] * 50), DataError, "could not convert string"),
    ("a table of complex", table_of(a=[1j] * 50, b=[0] * 50, c=[0] * 50), DataError, "Complex data not supported"),
    (
        "a table of dates",
        table_of(**dict.fromkeys("abc", np.zeros(50, "M8[s]"))),
        DataTypeError,
        rf"type datetime64.*\. {NO_NUMBERS}",
    ),
    (
        "a table of durations",
        table_of(**dict.fromkeys("abc", np.zeros(50, "m8[s]"))),
        DataTypeError,
        rf"type timedelta64.*\. {NO_NUMBERS}",
    ),
    (
        "a table of dates beside numbers",
        table_of(a=np.zeros(50, "M8[s]"), b=[0] * 50, c=[0] * 50),
        DataTypeError,
        "could not be promoted|datetime",
    ),
    ("a sparse matrix", sparse.csr_matrix(ROWS), DataTypeError, r"Sparse data.*'\.toarray\(\)'"),
    ("a sparse array", sparse.csr_array(ROWS), DataTypeError, r"Sparse data.*'\.toarray\(\)'"),
    (
        "masked values",
        np.ma.masked_greater(ROWS, 1.0),
        DataTypeError,
        "masked array, and some of its values are masked",
    ),
    (
        "masked values in dask",
        da.from_array(np.ma.masked_array(ROWS, np.arange(600).reshape(200, 3) == 400), chunks=50, asarray=False),
        DataTypeError,
        "Chunk 2 of the dask array is a masked array",
    ),
)

bad_numbers = table(
    ("NaN", at(np.nan), DataError, r"contains NaN in row 77, column 1\. .*nan_policy=\"omit\""),
    ("an infinity", at(np.inf), DataError, r"contains infinity in row 77, column 1\."),
    ("minus infinity", at(-np.inf), DataError, r"contains infinity in row 77, column 1\."),
    ("a list with NaN", at(np.nan).tolist(), DataError, r"contains NaN in row 77, column 1\."),
    (
        "a table with NaN",
        lambda f: table_of(**dict(zip("abc", at(np.nan).T, strict=True)))(f),
        DataError,
        "NaN in row 77",
    ),
    ("stored NaN", stored(at(np.nan), (50, 2)), DataError, r"NaN in row 77, column 1 \(chunk 1/0 of \w+\.zarr\)"),
    (
        "stored infinity",
        stored(at(np.inf, 150, 2), (50, 2)),
        DataError,
        r"row 150, column 2 \(chunk 3/1 of \w+\.zarr\)",
    ),
    (
        "an infinity in a shard",
        stored(at(-np.inf, 150, 2), (10, 1), shards=(50, 2)),
        DataError,
        r"infinity in row 150, column 2 \(shard 3/1 of \w+\.zarr\)",
    ),
    (
        "NaN of half precision",
        stored(at(np.nan).astype("f2"), (50, 3)),
        DataError,
        r"NaN in row 77, column 1 \(chunk 1/0",
    ),
    (
        "NaN in dask",
        da.from_array(at(np.nan), chunks=(50, 2)),
        DataError,
        r"NaN in row 77, column 1 \(chunk 1 of the dask",
    ),
    ("a large int64", at(EXACT + 1, dtype="i8"), DataError, rf"number {EXACT + 1} in row 77, column 1 is {TOO_LARGE}"),
    ("a large uint64", at(EXACT + 1, dtype="u8"), DataError, rf"number {EXACT + 1} in row 77, column 1 is {TOO_LARGE}"),
    ("the smallest int64", at(-(2**63), dtype="i8"), DataError, rf"number -{2**63} in row 77, column 1 is {TOO_LARGE}"),
    ("the largest uint64", at(2**64 - 1, dtype="u8"), DataError, rf"number {2**64 - 1} in row 77, column 1 is"),
    (
        "a stored int64",
        stored(at(-EXACT - 1, dtype="i8"), (50, 2)),
        DataError,
        rf"number -{EXACT + 1} in row 77, column 1 \(chunk 1/0 of \w+\.zarr\) is {TOO_LARGE}",
    ),
    (
        "a stored uint64",
        stored(at(2**63, 199, 2, dtype="u8"), (50, 2)),
        DataError,
        rf"number {2**63} in row 199, column 2 \(chunk 3/1 of \w+\.zarr\) is {TOO_LARGE}",
    ),
    (
        "an int64 in dask",
        da.from_array(at(EXACT + 2, 120, dtype="i8"), chunks=(50, 3)),
        DataError,
        rf"row 120, column 1 \(chunk 2 of the dask array\) is {TOO_LARGE}",
    ),
)

bad_shapes = table(
    ("nothing", None, DataError, "Expected 2D array, got scalar array"),
    ("a number", np.float64(3), DataError, "Expected 2D array, got scalar array"),
    ("one axis", ROWS[:, 0], DataError, r"got 1D array.*(\n.*)*array\.reshape\(-1, 1\)"),
    ("three axes", ROWS.reshape(50, 4, 3), DataError, "array with dim 3"),
    ("no rows", ROWS[:0], DataError, r"0 sample\(s\) \(shape=\(0, 3\)\)"),
    ("no features", ROWS[:, :0], DataError, r"0 feature\(s\)"),
    ("ragged lists", [[1, 2, 3], [4]], DataError, "inhomogeneous shape"),
    ("a dictionary", {"a": 1}, DataError, "Expected 2D array"),
    ("a generator", lambda folder: (row for row in ROWS), DataError, "Expected 2D array"),
    ("a series", lambda folder: pytest.importorskip("pandas").Series(range(50)), DataError, "Expected a 2-dimensional"),
    ("stored number", stored(3.0), DataError, r"0 dimension\(s\) \(\), but rows need two: \(rows, features\)"),
    ("stored, one axis", stored(ROWS[:, 0]), DataError, r"1 dimension\(s\) .*from_zarr\(PATH\)\.reshape\(-1, 1\)"),
    (
        "stored, three axes",
        stored(ROWS.reshape(50, 4, 3)),
        DataError,
        r"3 dimension\(s\) .*\.reshape\(-1, 3\) if the last",
    ),
    ("stored, no rows", never_written(0, 3), DataError, r"e\.zarr has 0 rows \(shape=\(0, 3\)\)"),
    ("stored, no features", never_written(5, 0), DataError, r"0 feature\(s\) .* in e\.zarr"),
    ("dask, one axis", da.from_array(ROWS[:, 0]), DataError, r"the dask array has 1 dimension\(s\)"),
    ("dask, three axes", da.from_array(ROWS.reshape(50, 4, 3)), DataError, r"the dask array has 3 dimension\(s\)"),
    ("dask, no rows", da.from_array(ROWS[:0]), DataError, "the dask array has 0 rows"),
    ("dask, no features", da.ones((50, 0)), DataError, r"0 feature\(s\) .* in the dask array"),
)


@bad_types
def test_rows_that_are_no_real_numbers_are_refused(bad: Bad, tmp_path: Path) -> None:
    thing = bad.made(tmp_path)
    fit_refuses(thing, bad)
    for use in (model().predict, model().score_samples, model().score):
        refuses(use, thing, bad)


@bad_numbers
def test_numbers_that_cannot_be_learned_from_are_refused_with_their_place(bad: Bad, tmp_path: Path) -> None:
    thing = bad.made(tmp_path)
    fit_refuses(thing, bad)
    for use in (model().predict, model().predict_proba, model().score, model().bic):
        refuses(use, thing, bad)


@bad_shapes
def test_what_is_no_table_of_rows_is_refused(bad: Bad, tmp_path: Path) -> None:
    thing = bad.made(tmp_path)
    fit_refuses(thing, bad)
    thing = bad.made(tmp_path / "again")
    for use in (model().predict, model().score):
        refuses(use, thing, bad)


@pytest.mark.parametrize("dtype", ["i8", "u8"])
@pytest.mark.parametrize("value", [EXACT, -EXACT])
def test_whole_numbers_that_float64_holds_are_taken(dtype: str, value: int, tmp_path: Path) -> None:
    rows = at(abs(value) if dtype == "u8" else value, dtype=dtype)
    for x in (rows, stored(rows, (50, 2))(tmp_path), da.from_array(rows, chunks=(50, 3))):
        found = GaussianMixture(1, random_state=0).fit(x)
        np.testing.assert_allclose(found.means_[0], rows.astype("f8").mean(axis=0), rtol=1e-12)


def test_the_largest_whole_number_is_not_named_for_one_beyond_it() -> None:
    rows = at(EXACT + 1, dtype="i8")
    rows[3] = EXACT
    with pytest.raises(DataError, match="row 77, column 1 is beyond"):
        GaussianMixture(1).fit(rows)


@table(
    ("fewer rows than components", ROWS[:3], DataError, "n_components = 4, n_samples = 3"),
    ("stored", stored(ROWS[:3]), DataError, "n_components = 4, n_samples = 3"),
    ("a single row", ROWS[:1], DataError, "minimum of 2"),
    ("a single stored row", stored(ROWS[:1]), DataError, "has 1 row, but a minimum of 2 is required"),
    ("fewer distinct rows", np.repeat(ROWS[:3], 20, axis=0), DataError, "Only 3 distinct rows .* but n_components=4"),
    ("stored repetitions", stored(np.repeat(ROWS[:3], 20, axis=0)), DataError, "Only 3 distinct rows"),
)
def test_fewer_rows_than_components_are_refused(bad: Bad, tmp_path: Path) -> None:
    refuses(GaussianMixture(4, random_state=0).fit, bad.made(tmp_path), bad)


# -- every place -------------------------------------------------------------------------------------------------


def places(n: int) -> list[tuple[int, int]]:
    """Random places, and the first and last rows of chunks of 60 rows."""
    rng = np.random.default_rng(11)
    random = zip(rng.integers(0, 400, n).tolist(), rng.integers(0, 3, n).tolist(), strict=True)
    return [*random, *((row, column) for row in (0, 59, 60, 119, 120, 359, 360, 399) for column in (0, 2))]


def names_the_place(array: Any, place: tuple[int, int], words: str) -> None:
    with pytest.raises(DataError, match=rf"row {place[0]}, column {place[1]}{words}"):
        GaussianMixture(2, random_state=0).fit(array)


def counts(n: int) -> pytest.MarkDecorator:
    """So many random places; ten times as many in the long form."""
    return pytest.mark.parametrize("n", [n, pytest.param(10 * n, marks=pytest.mark.long)])


@counts(400)
@pytest.mark.parametrize("home", ["numpy", "dask"])
def test_a_value_in_memory_is_named_wherever_it_is(home: str, n: int) -> None:
    rows = blobs(400)
    for i, (row, column) in enumerate(places(n)):
        kept, rows[row, column] = rows[row, column], (np.nan, np.inf, -np.inf)[i % 3]
        array = rows if home == "numpy" else da.from_array(rows, chunks=(60, 2))
        words = r"\. " if home == "numpy" else rf" \(chunk {row // 60} of the dask array\)"
        names_the_place(array, (row, column), words)
        rows[row, column] = kept


@counts(100)
@pytest.mark.parametrize(
    "layout", [{"chunks": (60, 2)}, {"chunks": (20, 1), "shards": (60, 2)}], ids=["plain", "sharded"]
)
def test_a_value_in_a_store_is_named_wherever_it_is(layout: dict[str, Any], n: int) -> None:
    unit, rows = "shard" if "shards" in layout else "chunk", blobs(400)
    array = zarr.create_array(MemoryStore(), data=rows, **layout)
    for i, (row, column) in enumerate(places(n)):
        array[row, column] = (np.nan, np.inf, -np.inf)[i % 3]
        names_the_place(array, (row, column), rf" \({unit} {row // 60}/{column // 2} of ")
        array[row, column] = rows[row, column]


def test_the_first_of_many_in_a_block_is_named(tmp_path: Path) -> None:
    rows = blobs(400)
    rows[[399, 133, 250], [0, 2, 1]] = np.nan
    for array in (rows, stored(rows, (60, 2))(tmp_path), da.from_array(rows, chunks=(400, 3))):
        names_the_place(array, (133, 2), "")


# -- features at predict -----------------------------------------------------------------------------------------


@table(
    ("fewer", ROWS[:, :2], DataError, "2 features, but GaussianMixture is expecting 3"),
    ("more", np.hstack([ROWS, ROWS]), DataError, "6 features, but GaussianMixture is expecting 3"),
    ("fewer in a store", stored(ROWS[:, :2]), DataError, r"\.zarr has 2 features, .* expecting 3 .* was fitted on"),
    ("fewer in dask", da.from_array(ROWS[:, :2]), DataError, "the dask array has 2 features, .* expecting 3"),
)
def test_other_features_than_those_of_the_fit_are_refused(bad: Bad, tmp_path: Path) -> None:
    thing = bad.made(tmp_path)
    for use in (model().predict, model().predict_proba, model().score_samples, model().score, model().bic):
        with pytest.raises(bad.error, match=bad.words):
            use(thing)


def test_names_in_another_order_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame(ROWS, columns=["a", "b", "c"])
    named = GaussianMixture(2, random_state=0).fit(rows)
    with pytest.raises(DataError, match=r"(?s)feature names should match.*in the same order"):
        named.predict(rows[["b", "a", "c"]])
    with pytest.raises(DataError, match=r"(?s)Feature names unseen at fit time:.*- z.*yet now missing:.*- a"):
        named.score(rows.rename(columns={"a": "z"}))


def test_an_unfitted_model_is_scikit_learns_error() -> None:
    for use in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(GaussianMixture(), use)(ROWS)


# -- weights -----------------------------------------------------------------------------------------------------


def weight(value: Any, row: int = 5) -> np.ndarray:
    weights = np.ones(200)
    weights[row] = value
    return weights


@table(
    (
        "negative",
        weight(-1.0),
        DataError,
        r"sample_weight of row 5 is -1\.0\. Weights must be finite and at least zero",
    ),
    ("NaN", weight(np.nan), DataError, "sample_weight of row 5 is nan"),
    ("infinite", weight(np.inf), DataError, "sample_weight of row 5 is inf"),
    ("all zero", np.zeros(200), DataError, "All (200 )?rows of the array have weight zero"),
    ("too few", np.ones(5), DataError, r"shape \(5,\), but the array has 200 rows"),
    ("too many", np.ones(201), DataError, r"shape \(201,\), but the array has 200 rows"),
    ("none", np.ones(0), DataError, r"shape \(0,\), but one weight for each row"),
    ("a number", 3.0, DataError, r"shape \(\), but one weight for each row"),
    ("two axes", np.ones((200, 1)), DataError, r"shape \(200, 1\), but one weight for each row"),
    ("complex", np.ones(200) + 0j, DataTypeError, "complex"),
    ("complex objects", np.array([1j] * 200, object), DataError, "sample_weight must be numbers"),
    ("text", np.array(["a"] * 200), DataError, "sample_weight must be numbers.*could not convert string"),
    ("dates", np.arange(200).astype("M8[s]"), DataTypeError, r"sample_weight holds .*datetime64\[s\].* real"),
    ("durations", np.arange(200).astype("m8[s]"), DataTypeError, r"sample_weight holds .*timedelta64\[s\].* real"),
    ("absent", np.array([None] * 200), DataError, "sample_weight of row 0 is nan"),
    ("sparse", sparse.csr_array(np.ones((1, 200))), DataError, "sample_weight must be numbers"),
    ("masked", np.ma.masked_array(np.ones(200), np.arange(200) == 7), DataTypeError, "sample_weight is a masked array"),
    ("no store", "nothing.zarr", SourceError, "no zarr array or group that can be opened at 'nothing.zarr'"),
    ("stored negative", stored(weight(-2.0), (50,)), DataError, r"sample_weight of row 5 is -2\.0"),
    ("stored NaN", stored(weight(np.nan, 150), (50,)), DataError, "sample_weight of row 150 is nan"),
    ("stored text", stored(np.array(["a"] * 200)), DataTypeError, NO_NUMBERS),
    ("stored, two axes", stored(np.ones((200, 1))), DataError, r"one number a row is expected: \(n,\)"),
    ("stored, too few", stored(np.ones(5)), DataError, r"shape \(5,\), but the array has 200 rows"),
    ("dask of text", da.from_array(np.array(["a"] * 200)), DataTypeError, NO_NUMBERS),
    ("dask NaN", da.from_array(weight(np.nan, 150), chunks=50), DataError, "sample_weight of row 150 is nan"),
)
def test_weights_without_meaning_are_refused(bad: Bad, tmp_path: Path) -> None:
    weights = bad.made(tmp_path)
    fit_refuses(ROWS, bad, sample_weight=weights)
    with pytest.raises(bad.error, match=bad.words):
        model().score(ROWS, sample_weight=weights)
