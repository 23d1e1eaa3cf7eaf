"""Numbers packed by the CF conventions: refused as they lie there, and decoded to what a hand computes."""

from __future__ import annotations

import base64
import re
import struct
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import assert_identical, blobs, fitted, given_start, mixture
from typer.testing import CliRunner

from streamgmm import GaussianMixture, cli, open_source
from streamgmm.errors import DataError, ParameterError, SourceError

WHOLE = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]

#: what max_iter=3 and tol=0 always say
pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")


def store(folder: Path, stored: np.ndarray, attributes: dict[str, Any], **options: Any) -> Path:
    path = folder / f"{uuid4().hex}.zarr"
    settings = {"chunks": (40, 3), "config": {"write_empty_chunks": True}, **options}
    zarr.create_array(str(path), data=stored, attributes=attributes, **settings)
    return path


def read(source: Any) -> np.ndarray:
    """All rows of a source, as its blocks hand them out."""
    return np.concatenate([piece.rows for block in source.blocks() for piece in block.pieces()])


def decoded(path: Path, **options: Any) -> np.ndarray:
    source = open_source(path, decode="cf", **options)
    rows = read(source)
    assert rows.dtype == source.dtype == np.float64
    return rows


def by_hand(stored: np.ndarray, scale: float = 1.0, offset: float = 0.0, missing: tuple[Any, ...] = ()) -> np.ndarray:
    """Value for value, in the numbers of Python."""
    values = [np.nan if v in missing else float(v) * scale + offset for v in stored.ravel().tolist()]
    return np.array(values).reshape(stored.shape)


def packed_blobs(dtype: str = "i2") -> np.ndarray:
    """(500, 3) numbers that scale_factor 0.01 and add_offset 3 unpack to three overlapping components."""
    return np.round((blobs(500) - 3) / 0.01).astype(dtype)


def fit(rows: Any) -> GaussianMixture:
    """Three passes from a given start."""
    return mixture("full", max_iter=3, tol=0.0, **given_start("full")).fit(rows)


def as_text(value: float) -> str:
    """As xarray writes the missing value of floating-point numbers into version 3 stores."""
    return base64.standard_b64encode(struct.pack("<d", value)).decode()


# -- refused -----------------------------------------------------------------------------------------------------

PACKED = [
    ("i2", {"scale_factor": 0.01}, "scale_factor"),
    ("i2", {"scale_factor": [0.01]}, "scale_factor"),
    ("i2", {"add_offset": -273.15}, "add_offset"),
    ("i2", {"scale_factor": 0.01, "add_offset": 273.15}, "scale_factor, add_offset"),
    ("u2", {"scale_factor": "0.01"}, "scale_factor"),
    ("i2", {"_FillValue": -9999}, "_FillValue"),
    ("i2", {"_FillValue": [-9999]}, "_FillValue"),
    ("i2", {"_FillValue": 0}, "_FillValue"),
    ("i2", {"missing_value": [-9999, -9998]}, "missing_value"),
    ("f4", {"missing_value": 1e20}, "missing_value"),
    ("f4", {"_FillValue": as_text(-9999.0)}, "_FillValue"),
    ("f8", {"_FillValue": as_text(-9999.0)}, "_FillValue"),
    ("f8", {"_FillValue": "Infinity"}, "_FillValue"),
    ("i1", {"_Unsigned": "true"}, "_Unsigned"),
    ("u1", {"_Unsigned": "false"}, "_Unsigned"),
    ("f4", {"scale_factor": 2.0, "_FillValue": as_text(np.nan), "units": "K"}, "scale_factor, _FillValue"),
]


@pytest.mark.parametrize(("dtype", "attributes", "names"), PACKED)
def test_packed_numbers_are_refused_by_default(
    dtype: str, attributes: dict[str, Any], names: str, tmp_path: Path
) -> None:
    model, path = fitted(), store(tmp_path, blobs(200).astype(dtype), attributes)
    before, words = (
        model.means_,
        rf"packed numbers, not values: its attributes are {names}\. Open it with .*decode=\"cf\"",
    )
    for use in (model.fit, model.predict, model.score, model.plan, open_source):
        with pytest.raises(DataError, match=words):
            use(path)
    assert model.means_ is before
    assert open_source(path, decode="cf").dtype == np.float64


HARMLESS = [
    ("i2", {"scale_factor": 1.0, "add_offset": 0.0}),
    ("i2", {"scale_factor": [1], "add_offset": [0]}),
    ("i2", {"_FillValue": as_text(np.nan)}),
    ("f4", {"_FillValue": as_text(np.nan), "missing_value": as_text(np.nan)}),
    ("f8", {"_FillValue": "NaN", "missing_value": ["nan"]}),
    ("f8", {"_FillValue": None}),
    ("u1", {"_Unsigned": "true"}),
    ("i1", {"_Unsigned": "false"}),
    ("f4", {"_Unsigned": "true"}),
    (
        "i2",
        {"units": "K", "long_name": "temperature", "valid_range": [0, 100], "_ARRAY_DIMENSIONS": ["row", "feature"]},
    ),
]


@pytest.mark.parametrize(("dtype", "attributes"), HARMLESS)
@pytest.mark.parametrize("decode", ["refuse", "cf"])
def test_attributes_that_change_nothing_change_nothing(
    dtype: str, attributes: dict[str, Any], decode: str, tmp_path: Path
) -> None:
    stored = blobs(200).astype(dtype)
    source = open_source(store(tmp_path, stored, attributes), decode=decode)
    rows = read(source)
    assert rows.dtype == source.dtype == stored.dtype
    np.testing.assert_array_equal(rows, stored)


def test_the_ways_out_work(tmp_path: Path) -> None:
    path = store(tmp_path, packed_blobs(), {"scale_factor": 0.01, "add_offset": 3.0})
    with pytest.raises(DataError, match="or remove the attributes if the stored numbers are the values") as error:
        fit(path)
    (advice,) = re.findall(r'open_source\(\.\.\., (\w+)="(\w+)"\)', str(error.value))
    np.testing.assert_array_equal(
        read(open_source(path, **dict([advice]))), by_hand(packed_blobs(), scale=0.01, offset=3.0)
    )
    array = zarr.open_array(path, mode="r+")
    array.attrs.clear()
    np.testing.assert_array_equal(read(open_source(path)), packed_blobs())


def test_packed_weights_are_refused_and_their_way_out_works(tmp_path: Path) -> None:
    rows, weights = blobs(500), np.random.default_rng(0).integers(1, 9, 500).astype("i2")
    path = store(tmp_path, weights, {"scale_factor": 0.5}, chunks=(50,))
    with pytest.raises(DataError, match=r"packed numbers.*scale_factor\. Write them unpacked, or give a dask array"):
        mixture().fit(rows, sample_weight=path)
    start = mixture("full", max_iter=3, tol=0.0, **given_start("full"))
    expected = start.fit(rows, sample_weight=0.5 * weights).means_
    np.testing.assert_array_equal(start.fit(rows, sample_weight=0.5 * da.from_zarr(str(path))).means_, expected)


def test_decode_is_for_stores() -> None:
    with pytest.raises(ParameterError, match="decode describe a zarr store, but the rows given are not in one"):
        open_source(blobs(), decode="cf")


NONSENSE = [
    ("scale_factor", "abc"),
    ("scale_factor", ""),
    ("scale_factor", None),
    ("scale_factor", []),
    ("scale_factor", [1, 2]),
    ("scale_factor", [[0.5]]),
    ("scale_factor", {"value": 2}),
    ("scale_factor", True),
    ("scale_factor", 10**400),
    ("add_offset", "3 K"),
    ("add_offset", None),
    ("add_offset", [None]),
    ("_FillValue", "none"),
    ("_FillValue", [[1, 2]]),
    ("_FillValue", {"re": 1}),
    ("missing_value", [1, "two"]),
    ("missing_value", [None]),
    ("missing_value", "AAAA"),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
@pytest.mark.parametrize("decode", ["refuse", "cf"])
def test_attributes_that_are_no_numbers_are_refused(name: str, value: Any, decode: str, tmp_path: Path) -> None:
    path = store(tmp_path, packed_blobs(), {name: value})
    with pytest.raises(
        DataError, match=rf"The attribute {name} of .*\.zarr is .* ask for a number\. Mend the attribute"
    ):
        open_source(path, decode=decode)


@pytest.mark.parametrize("name", ["scale_factor", "add_offset"])
@pytest.mark.parametrize("value", ["inf", "-Infinity", "nan", as_text(np.inf)])
def test_factors_that_are_not_finite_are_refused(name: str, value: str, tmp_path: Path) -> None:
    path = store(tmp_path, packed_blobs(), {name: value})
    with pytest.raises(DataError, match=rf"The attribute {name} of .*\.zarr is .*, but it must be finite"):
        open_source(path, decode="cf")


@pytest.mark.parametrize(
    ("dtype", "value"), [("u1", -1), ("u1", 256), ("i1", 200), ("i2", 1e20), ("i2", -0.5), ("i2", "inf"), ("f4", 1e300)]
)
def test_a_missing_value_that_no_stored_number_can_be_is_refused(dtype: str, value: Any, tmp_path: Path) -> None:
    path = store(tmp_path, np.abs(blobs(200)).astype(dtype), {"_FillValue": value})
    with pytest.raises(DataError, match=rf"_FillValue of .* is .*, which its type {np.dtype(dtype)} does not hold"):
        open_source(path, decode="cf")


# -- decoded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*WHOLE, "f4", "f8"])
@pytest.mark.parametrize("layout", [{}, {"chunks": (7, 2)}, {"shards": (40, 4), "chunks": (10, 2)}, {"zarr_format": 2}])
def test_decoding_is_what_a_hand_computes(dtype: str, layout: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = (
        rng.integers(0, 100, (203, 3)).astype(dtype) if dtype[0] != "f" else rng.normal(size=(203, 3)).astype(dtype)
    )
    stored[rng.random(stored.shape) < 0.1] = 77
    stored[rng.random(stored.shape) < 0.1] = 33
    path = store(
        tmp_path,
        stored,
        {"scale_factor": 0.01, "add_offset": -273.15, "_FillValue": 77, "missing_value": [33]},
        **layout,
    )
    np.testing.assert_array_equal(decoded(path), by_hand(stored, 0.01, -273.15, (77, 33)))


@pytest.mark.parametrize("dtype", WHOLE)
def test_the_ends_of_a_type_are_missing_and_their_neighbours_are_not(dtype: str, tmp_path: Path) -> None:
    """float64 takes the largest of 64 bits and its neighbours for one number."""
    limits = np.iinfo(dtype)
    stored = np.array([[limits.min, limits.max, 5], [limits.min + 1, limits.max - 1, 6]], dtype=dtype)
    path = store(tmp_path, stored, {"_FillValue": int(limits.max), "missing_value": int(limits.min)}, chunks=(2, 3))
    if stored.dtype.itemsize == 8:
        with pytest.raises(DataError, match=r"in row 1, column [01] .* is beyond 2\*\*53"):
            decoded(path)
        return
    np.testing.assert_array_equal(decoded(path), by_hand(stored, missing=(limits.min, limits.max)))


@pytest.mark.parametrize("value", [1e20, -9999.9, 0.1])
@pytest.mark.parametrize("name", ["_FillValue", "missing_value"])
def test_a_decimal_number_is_found_among_float32(value: float, name: str, tmp_path: Path) -> None:
    """No float32 is 1e20: what is stored for it is the nearest."""
    stored = blobs(100).astype("f4")
    stored[::7, 1] = value
    expected = stored.astype("f8")
    expected[::7, 1] = np.nan
    np.testing.assert_array_equal(decoded(store(tmp_path, stored, {name: value})), expected)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("value", [-9999.0, 1e20, np.inf])
def test_the_text_that_xarray_writes_is_a_number(dtype: str, value: float, tmp_path: Path) -> None:
    stored = blobs(100).astype(dtype)
    stored[::7, 1] = value
    expected = stored.astype("f8")
    expected[::7, 1] = np.nan
    text = as_text(float(np.array(value, dtype)))
    np.testing.assert_array_equal(decoded(store(tmp_path, stored, {"_FillValue": text})), expected)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8"])
@pytest.mark.parametrize("missing", [-1, "largest"])
def test_unsigned_numbers_in_a_signed_type(dtype: str, missing: Any, tmp_path: Path) -> None:
    """The missing value may be written as the signed number, or as the unsigned one that it means."""
    meant = np.array([[0, 1, 100], [127, 128, 254], [255, 3, 255]]).astype(dtype.replace("i", "u"))
    meant[meant == 255] = np.iinfo(meant.dtype).max
    largest = np.iinfo(meant.dtype).max
    attributes = {"_Unsigned": "true", "_FillValue": largest if missing == "largest" else missing, "scale_factor": 0.5}
    path = store(tmp_path, meant.view(dtype), attributes, chunks=(2, 3))
    np.testing.assert_array_equal(decoded(path), by_hand(meant, 0.5, missing=(largest,)))


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_signed_numbers_in_an_unsigned_type(dtype: str, tmp_path: Path) -> None:
    meant = np.array([[0, 1, 100], [-1, -100, -128]], dtype=dtype.replace("u", "i"))
    attributes = {"_Unsigned": "false", "_FillValue": -128, "add_offset": 1.0}
    path = store(tmp_path, meant.view(dtype), attributes, chunks=(2, 3))
    np.testing.assert_array_equal(decoded(path), by_hand(meant, offset=1.0, missing=(-128,)))


@pytest.mark.parametrize("dtype", [">i2", "<i2", ">f4", ">u4"])
@pytest.mark.parametrize("form", [2, 3])
def test_any_order_of_bytes(dtype: str, form: int, tmp_path: Path) -> None:
    stored = np.arange(150).reshape(50, 3).astype(dtype)
    attributes = {"scale_factor": 0.5, "_FillValue": 7, "_Unsigned": "true"}
    path = store(tmp_path, stored, attributes, zarr_format=form)
    np.testing.assert_array_equal(decoded(path), by_hand(stored, 0.5, missing=(7,)))


@pytest.mark.parametrize(("dtype", "fill"), [("i2", -9999), ("i8", -(2**63)), ("f4", 1e20), ("f8", -1.0), ("u1", 255)])
def test_a_version_2_store_as_xarray_writes_it(dtype: str, fill: Any, tmp_path: Path) -> None:
    """Its fill value is the missing value; that of other version 2 stores is only what is not stored."""
    stored = np.abs(blobs(100)).astype(dtype)
    stored[::7, 2] = fill
    layout = {"zarr_format": 2, "fill_value": fill}
    path = store(tmp_path, stored, {"_ARRAY_DIMENSIONS": ["row", "feature"]}, **layout)
    with pytest.raises(DataError, match=r"its attributes are fill_value\. Open it"):
        open_source(path)
    expected = stored.astype("f8")
    expected[::7, 2] = np.nan
    np.testing.assert_array_equal(decoded(path), expected)
    np.testing.assert_array_equal(read(open_source(store(tmp_path, stored, {}, **layout))), stored)


def test_a_version_2_store_of_xarray_whose_fill_value_is_nan_is_not_packed(tmp_path: Path) -> None:
    layout = {"zarr_format": 2, "fill_value": np.nan}
    path = store(tmp_path, blobs(100), {"_ARRAY_DIMENSIONS": ["row", "feature"]}, **layout)
    np.testing.assert_array_equal(read(open_source(path)), blobs(100))


# -- missing rows ------------------------------------------------------------------------------------------------


def with_gaps(stored: np.ndarray, value: Any = -9999) -> np.ndarray:
    gaps = stored.copy()
    gaps[57, 1] = gaps[58, 0] = gaps[499, 2] = value
    return gaps


def test_missing_numbers_are_named_or_left_out(tmp_path: Path) -> None:
    stored = with_gaps(packed_blobs())
    path = store(tmp_path, stored, {"scale_factor": 0.01, "add_offset": 3.0, "_FillValue": -9999})
    with pytest.raises(DataError, match=r"contains NaN in row 57, column 1 \(chunk 1/0 of .*nan_policy=\"omit\""):
        fit(open_source(path, decode="cf"))
    source = open_source(path, decode="cf", nan_policy="omit")
    found, kept = fit(source), np.delete(np.arange(500), [57, 58, 499])
    expected = fit(by_hand(stored, 0.01, 3.0)[kept])
    np.testing.assert_allclose(found.means_, expected.means_, rtol=1e-12)
    np.testing.assert_allclose(found.covariances_, expected.covariances_, rtol=1e-11)
    assert (found.n_rows_, found.n_skipped_) == (497, 3)
    labels = found.predict(source).compute()
    np.testing.assert_array_equal(np.flatnonzero(labels == -1), [57, 58, 499])
    np.testing.assert_array_equal(labels[kept], expected.predict(by_hand(stored, 0.01, 3.0)[kept]))


def test_a_fit_of_packed_numbers_is_the_fit_of_their_values(tmp_path: Path) -> None:
    source = open_source(store(tmp_path, packed_blobs(), {"scale_factor": 0.01, "add_offset": 3.0}), decode="cf")
    values = by_hand(packed_blobs(), 0.01, 3.0)
    found, expected = fit(source), fit(open_source(values, block_rows=source.block_rows))
    assert_identical(found, expected)
    assert found.score(source) == expected.score(open_source(values, block_rows=source.block_rows))
    np.testing.assert_array_equal(found.score_samples(source).compute(), expected.score_samples(values))


def test_chunks_that_are_not_there_are_decoded_too(tmp_path: Path) -> None:
    """The words and the rows are of the value that a fill value means."""
    stored = packed_blobs()
    path = store(tmp_path, stored, {"scale_factor": 0.01, "add_offset": 3.0}, fill_value=100)
    (path / "c/2/0").unlink()
    with pytest.raises(SourceError, match=r"as the fill value 4\.0, "):
        open_source(path, decode="cf")
    stored[80:120] = 100
    np.testing.assert_array_equal(decoded(path, missing_chunks="fill"), by_hand(stored, 0.01, 3.0))


def test_chunks_that_are_not_there_may_be_missing_numbers(tmp_path: Path) -> None:
    path = store(
        tmp_path, packed_blobs(), {"scale_factor": 0.01, "add_offset": 3.0, "_FillValue": -9999}, fill_value=-9999
    )
    (path / "c/2/0").unlink()
    with pytest.raises(SourceError, match=r'as the fill value nan, .*nan_policy="omit"'):
        open_source(path, decode="cf")
    model = fit(open_source(path, decode="cf", nan_policy="omit"))
    assert (model.n_rows_, model.n_skipped_) == (460, 40)


def test_the_command_line_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store(tmp_path, with_gaps(packed_blobs()), {"scale_factor": 0.01, "_FillValue": -9999}).rename("p.zarr")
    words = ["fit", "p.zarr", "-k", "2", "-o", "m.sgmm"]
    refused = CliRunner().invoke(cli.app, words)
    assert refused.exit_code == 1
    assert "Open it with --decode cf to decode them" in refused.output
    assert CliRunner().invoke(cli.app, [*words, "--decode", "cf", "--nan-policy", "omit"]).exit_code == 0


@pytest.mark.parametrize("value", [10**30, -(10**30), 2**64])
def test_a_missing_value_beyond_64_bits_is_refused(tmp_path: Path, value: int) -> None:
    with pytest.raises(DataError, match=r"_FillValue of .* does not hold"):
        open_source(store(tmp_path, np.ones((10, 2), "i8"), {"_FillValue": value}), decode="cf")


@pytest.mark.parametrize("number", [2**60 + 1, -(2**60)])
def test_packed_whole_numbers_that_float64_would_round_are_named(tmp_path: Path, number: int) -> None:
    stored = np.zeros((40, 2), "i8")
    stored[3, 0], stored[27, 1] = -(2**63), number
    path = store(tmp_path, stored, {"_FillValue": -(2**63)})
    with pytest.raises(DataError, match=rf"stored number {number} in row 27, column 1 .* beyond 2\*\*53"):
        GaussianMixture().fit(open_source(path, decode="cf", nan_policy="omit"))


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scale_factor of .* is 0, but it must be finite, and a scale not zero"):
        open_source(store(tmp_path, np.ones((10, 2), "i2"), {"scale_factor": 0}), decode="cf")
