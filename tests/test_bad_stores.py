"""Settings, stores and files that cannot be right: each is refused in words, and leaves no trace."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
import zarr
from refusals import ROWS, Bad, fit_refuses, model, refuses, state, stored, table

from streamgmm import GaussianMixture, load, open_source
from streamgmm.errors import DataError, DataTypeError, FileFormatError, ParameterError, SourceError, StreamGMMError

# -- hyper-parameters --------------------------------------------------------------------------------------------

SETTINGS: list[tuple[str, list[Any], str]] = [
    ("n_components", [0, -1, 2.5, True, None, "3", np.nan], "must be a whole number of at least 1, but it is"),
    ("tol", [-1, -1e-9, np.nan, np.inf, "x", True], "must be None or a number of at least zero"),
    ("reg_covar", [-1e-9, np.nan, np.inf, None, "x"], "must be a number of at least zero"),
    ("max_iter", [-1, 1.5, None, True, "9"], "must be a whole number of at least 0"),
    ("n_init", [0, 2.5, None], "must be a whole number of at least 1"),
    ("random_state", [-1, 1.5, "x", [1], np.nan], "must be None, a non-negative integer below"),
    ("covariance_type", ["fulll", "Full", None, 3, ["full"]], "must be one of 'full', 'tied', 'diag', 'spherical'"),
    ("init_params", ["kmean", None, 3], "must be one of 'auto', 'split'"),
    ("solver", ["newton", None], "must be one of 'auto', 'em', 'incremental'"),
    ("warm_start", ["yes", 1, None], "must be True or False"),
    ("verbose", [-1, "x", None], "must be a whole number of at least 0"),
    ("verbose_interval", [0, None], "must be a whole number of at least 1"),
    ("weights_init", [[1.0], [[0.5, 0.5]]], r"must have the shape \(2,\)"),
    ("weights_init", [[0.5, 0.6], [0.0, 0.0], [-0.5, 1.5]], "must be at least zero and sum to 1"),
    ("weights_init", [[np.nan, 1.0], [np.inf, 0.0]], "must be finite"),
    ("weights_init", ["ab", [None, "x"], [1j, 0]], "must be real numbers"),
    ("means_init", [ROWS[:3], ROWS[:2, :2], ROWS[0]], r"must have the shape \(2, 3\)"),
    ("means_init", [np.full((2, 3), np.nan)], "must be finite"),
    ("means_init", ["x", [[1, 2], [3]], ROWS[:2] + 0j], "must be real numbers"),
    ("precisions_init", [np.eye(3), np.ones((2, 3)), np.stack([np.eye(2)] * 2)], r"must have the shape \(2, 3, 3\)"),
    ("precisions_init", [np.stack([np.eye(3), -np.eye(3)]), np.zeros((2, 3, 3))], "must be positive definite"),
    ("precisions_init", [np.stack([np.eye(3) + np.eye(3, k=1)] * 2)], "must be symmetric matrices"),
    ("precisions_init", [np.full((2, 3, 3), np.nan)], "must be finite"),
]


@pytest.mark.parametrize(("name", "values", "words"), SETTINGS, ids=lambda it: it if isinstance(it, str) else "")
def test_hyper_parameters_without_meaning_are_refused(name: str, values: list[Any], words: str) -> None:
    for value in values:
        new, old = GaussianMixture(2, **{name: value}) if name != "n_components" else GaussianMixture(value), model()
        before = state(old.set_params(**{"n_components": 2, name: value}))
        for given in (new, old):
            refuses(given.fit, ROWS, Bad("", lambda _: None, ParameterError, f"{name} {words}"))
        assert state(old) == before


# -- stores ------------------------------------------------------------------------------------------------------


def group(folder: Path) -> Path:
    root = zarr.open_group(folder / "g.zarr", mode="w")
    root.create_array("pixels", data=ROWS)
    root.create_group("more")
    return folder / "g.zarr"


OPTIONS: list[tuple[str, Callable[[Path], Any], dict[str, Any], type[StreamGMMError], str]] = [
    ("a missing store", lambda f: f / "no.zarr", {}, SourceError, "no zarr array or group that can be opened at"),
    ("no path at all", lambda f: "", {}, SourceError, "no zarr array or group that can be opened at ''"),
    ("a file", lambda f: Path(__file__), {}, SourceError, "Check the path, and that the store was written by zarr"),
    ("a folder", lambda f: f, {}, SourceError, "Check the path, and that the store was written by zarr"),
    ("a group", group, {}, SourceError, r"group of arrays \['pixels'\]\. Say which one with array=NAME"),
    ("an open group", lambda f: zarr.open_group(group(f)), {}, SourceError, r"group of arrays \['pixels'\]"),
    ("a wrong name", group, {"array": "pixel"}, SourceError, r"no array 'pixel'; it holds \['pixels'\]"),
    ("the name of a group", group, {"array": "more"}, SourceError, r"no array 'more'; it holds \['pixels'\]"),
    ("an empty name", group, {"array": ""}, SourceError, r"no array ''; it holds"),
    ("a name that is none", group, {"array": 3}, ParameterError, "array must be the name of an array in the group"),
    (
        "a name that leads out",
        group,
        {"array": "../g.zarr/pixels"},
        SourceError,
        r"cannot be opened .*'\.\./g.*invalid",
    ),
    (
        "a name in an array",
        stored(ROWS),
        {"array": "pixels"},
        SourceError,
        "is an array, not a group, so array='pixels'",
    ),
    (
        "a policy",
        stored(ROWS),
        {"nan_policy": "skip"},
        ParameterError,
        "nan_policy must be 'raise' or 'omit', .* 'skip'",
    ),
    ("no policy", stored(ROWS), {"nan_policy": None}, ParameterError, "nan_policy must be 'raise' or 'omit', .* None"),
    ("policies", stored(ROWS), {"nan_policy": np.array(["omit"] * 2)}, ParameterError, "nan_policy must be"),
    (
        "chunks",
        stored(ROWS),
        {"missing_chunks": "ignore"},
        ParameterError,
        "missing_chunks must be 'refuse', 'fill' or 'wait'",
    ),
    ("code", stored(ROWS), {"decode": "CF"}, ParameterError, "decode must be 'refuse' or 'cf', but it is 'CF'"),
    (
        "truth as code",
        stored(ROWS),
        {"decode": True},
        ParameterError,
        "decode must be 'refuse' or 'cf', but it is True",
    ),
    ("no block", stored(ROWS), {"block_rows": 0}, ParameterError, "block_rows must be a positive whole number"),
    ("half a block", stored(ROWS), {"block_rows": 0.5}, ParameterError, "block_rows must be a positive whole number"),
    ("a name in numpy", lambda f: ROWS, {"array": "pixels"}, ParameterError, "describe a zarr store"),
    ("filling numpy", lambda f: ROWS, {"missing_chunks": "fill"}, ParameterError, "describe a zarr store"),
    (
        "masked rows",
        lambda f: np.ma.masked_greater(ROWS, 1.0),
        {},
        DataTypeError,
        "masked array, and some of its values are masked",
    ),
    ("a list", lambda f: ROWS.tolist(), {}, DataTypeError, "cannot be read from a list"),
    ("nothing", lambda f: None, {}, DataTypeError, "cannot be read from a NoneType"),
    ("sparse rows", lambda f: sparse.csr_array(ROWS), {}, DataTypeError, "cannot be read from a csr_array"),
]


@pytest.mark.parametrize(
    ("made", "options", "error", "words"), [row[1:] for row in OPTIONS], ids=[r[0] for r in OPTIONS]
)
def test_what_cannot_be_opened_is_refused(
    made: Callable[[Path], Any], options: dict[str, Any], error: type[StreamGMMError], words: str, tmp_path: Path
) -> None:
    refuses(lambda x: open_source(x, **options), made(tmp_path), Bad("", made, error, words))


def test_packed_numbers_are_refused(tmp_path: Path) -> None:
    path = stored(ROWS.astype("i2"), attributes={"scale_factor": 0.1})(tmp_path)
    fit_refuses(path, Bad("", stored, DataError, r"packed numbers, not values: its attributes are scale_factor\."))


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in half": (lambda data: data[: len(data) // 2], r"\({} 1/0 of d\.zarr\) on could not be read: .* is damaged"),
    "one byte short": (lambda data: data[:-1], r"\({} 1/0 of d\.zarr\) on could not be read: .* is damaged"),
    "empty": (lambda data: b"", r"\({} 1/0 of d\.zarr\) on could not be read|lacks 1 of 8 {}s \(1/0: rows 50 to 99\)"),
    "noise": (lambda data: bytes(range(256)), r"\({} 1/0 of d\.zarr\) on could not be read: .* is damaged"),
}
STORES = {
    "v2": ({"zarr_format": 2}, "1.0"),
    "v3": ({}, "c/1/0"),
    "v3, uncompressed": ({"compressors": None}, "c/1/0"),
    "sharded": ({"chunks": (25, 1), "shards": (50, 2)}, "c/1/0"),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("damage", [*DAMAGES, "deleted"])
def test_a_damaged_chunk_is_named(store: str, damage: str, tmp_path: Path) -> None:
    options, key = STORES[store]
    path = tmp_path / "d.zarr"
    zarr.create_array(str(path), data=ROWS, **{"chunks": (50, 2), **options})
    unit = "shard" if store == "sharded" else "chunk"
    words = r"lacks 1 of 8 {}s \(1/0: rows 50 to 99\)"
    if damage == "deleted":
        (path / key).unlink()
    else:
        change, words = DAMAGES[damage]
        (path / key).write_bytes(change((path / key).read_bytes()))
    fit_refuses(path, Bad("", stored, SourceError, words.format(unit, unit)))
    for use in (model().predict, model().score):
        refuses(use, path, Bad("", stored, SourceError, words.format(unit, unit)))


# -- model files -------------------------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    model().save(folder / "m.sgmm")
    return folder / "m.sgmm"


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        path = saved(folder)
        path.write_bytes(change(path.read_bytes()))
        return path

    return made


def flipped(data: bytes) -> bytes:
    """One bit of the last number."""
    return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]


def enormous(folder: Path) -> Path:
    """3 GB that take no room on the disk."""
    path = saved(folder)
    os.truncate(path, 3_000_000_000)
    return path


def linked(folder: Path) -> Path:
    (folder / "l.sgmm").symlink_to(saved(folder))
    return folder / "l.sgmm"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "p.sgmm")
    return folder / "p.sgmm"


class Touch:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(folder: Path) -> Path:
    (folder / "m.pkl").write_bytes(pickle.dumps(Touch(folder / "executed")))
    return folder / "m.pkl"


@table(
    ("cut short", changed(lambda data: data[:-8]), FileFormatError, r"m\.sgmm cannot be read.*damaged"),
    ("cut in the header", changed(lambda data: data[:100]), FileFormatError, r"header would have .*damaged"),
    ("no bytes", changed(lambda data: b""), FileFormatError, r"m\.sgmm cannot be read as a streamgmm file"),
    ("one bit flipped", changed(flipped), FileFormatError, r"m\.sgmm is damaged: the contents of \['\w+'\]"),
    (
        "newer",
        changed(lambda data: data.replace(b'\\"format\\": 1', b'\\"format\\": 9')),
        FileFormatError,
        "has format 9; this version of streamgmm reads format 1. Install a newer streamgmm",
    ),
    ("huge", enormous, FileFormatError, r"3,000,000,000 bytes, but a model has at most 2,147,483,648"),
    (
        "a header of 1e15 bytes",
        changed(lambda data: struct.pack("<Q", 10**15) + data[8:]),
        FileFormatError,
        "its header would have 1,000,000,000,000,000 bytes",
    ),
    ("a pickle", pickled, FileFormatError, r"m\.pkl cannot be read as a streamgmm file"),
    ("a link", linked, FileFormatError, r"is a symbolic link.* Give the path of the file"),
    ("a folder", lambda folder: folder, FileFormatError, "it is a folder"),
    ("a pipe", pipe, FileFormatError, "it is no regular file"),
    ("a missing file", lambda folder: folder / "no.sgmm", FileFormatError, "it is not there. Give the path"),
    ("a zarr store", stored(ROWS), FileFormatError, "it is a folder"),
)
def test_files_that_hold_no_model_are_refused(bad: Bad, tmp_path: Path) -> None:
    refuses(load, bad.made(tmp_path), bad)
    assert not (tmp_path / "executed").exists()


def test_the_pickle_would_have_been_executed(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path).read_bytes())
    assert (tmp_path / "executed").exists()


# -- documented --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "errors"),
    [
        (GaussianMixture.fit, (DataError, DataTypeError, ParameterError, SourceError)),
        (open_source, (DataError, DataTypeError, ParameterError, SourceError)),
        (load, (FileFormatError,)),
    ],
)
def test_the_errors_of_these_tables_are_documented(
    function: Callable[..., Any], errors: tuple[type[StreamGMMError], ...]
) -> None:
    assert [error.__name__ for error in errors if error.__name__ not in (function.__doc__ or "")] == []
