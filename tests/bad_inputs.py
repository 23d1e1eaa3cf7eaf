"""Rows that nobody should give: arrays, containers and stores, made at random from the number of a case alone."""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse
import zarr

from streamgmm import GaussianMixture

SEED = 20_240_917
KNOWN = GaussianMixture.from_parameters([0.5, 0.5], [[0.0, 0.0], [3.0, 1.0]], np.stack([np.eye(2), 2 * np.eye(2)]))

Choices = Mapping[str, Callable[[], Any]]


class Draw:
    """The random choices of one case, and the words that tell them. folder: where its files go."""

    def __init__(self, number: int, folder: Path) -> None:
        self.rng = np.random.default_rng([SEED, number])
        self.folder = folder / f"{number}"
        self.words: list[str] = []

    def of(self, what: str, choices: Choices, odds: float = 0.0) -> Any:
        """One of the choices; the first one, the sane one, at least with the probability ``odds``."""
        names = list(choices)
        name = names[0] if self.rng.random() < odds else names[int(self.rng.integers(len(names)))]
        self.words.append(f"{what}: {name}")
        return choices[name]()

    def among(self, what: str, values: Any, odds: float = 0.0) -> Any:
        """One of the values; what a repr cannot tell is told by its type."""
        return self.of(what, {_words(value): lambda value=value: value for value in values}, odds)


def _words(value: Any) -> str:
    try:
        return f"{type(value).__name__} {value!r:.40}"
    except Exception:  # an integer of too many digits
        return type(value).__name__


# -- arrays ------------------------------------------------------------------------------------------------------


def shape(draw: Draw) -> tuple[int, ...]:
    n, d = int(draw.rng.integers(3, 60)), int(draw.rng.integers(1, 4))
    odd = [(), (0,), (7,), (0, 2), (5, 0), (0, 0), (1, 1), (1, 3), (2, 1), (2, 2), (3, 4, 5), (2, 2, 2, 2), (9, 70)]
    return draw.among("shape", [(n, d), (n, 2), *odd], 0.8)


def values(draw: Draw, size: tuple[int, ...]) -> np.ndarray:
    x = draw.rng.normal(size=size)

    def some(value: float, share: float = 0.05) -> np.ndarray:
        return np.where(draw.rng.random(size) < share, value, x)

    choices: Choices = {
        "normal": lambda: x,
        "some NaN": lambda: some(np.nan),
        "all NaN": lambda: x * np.nan,
        "some inf": lambda: some(np.inf),
        "some -inf": lambda: some(-np.inf),
        "some 1e300": lambda: some(1e300),
        "some -1e154": lambda: some(-1e154),
        "times 1e160": lambda: x * 1e160,
        "times 1e100": lambda: x * 1e100,
        "times 1e-100": lambda: x * 1e-100,
        "times 1e-160": lambda: x * 1e-160,
        "subnormal": lambda: x * 1e-310,
        "some subnormal": lambda: some(5e-324, 0.5),
        "zero": lambda: x * 0,
        "constant": lambda: x * 0 + 3.25,
        "two values": lambda: np.sign(x),
        "ten distinct": lambda: np.round(x, 0),
        "offset 1e9": lambda: x + 1e9,
        "offset 1e16": lambda: x + 1e16,
        "negative": lambda: -np.abs(x),
        "columns of other scales": lambda: x * 10.0 ** draw.rng.uniform(-140, 140, size[-1:]),
        "int64 extremes": lambda: np.where(x > 0, 2.0**63 - 1024, -(2.0**63)),
        "repeated": lambda: x * 0 + x.reshape(-1)[0] if x.size else x,
    }
    return np.asarray(draw.of("values", choices, 0.6))


DTYPES = [
    "f8", "f4", "f2", "g", ">f8", ">f4", ">i4", "?", "b", "B", "h", "H", "i", "I", "q", "Q", ">u8", "F", "D", "G",
    "S5", "U5", "M8[s]", "m8[ns]", "V8", "O",
]  # fmt: skip


def typed(draw: Draw, x: np.ndarray) -> np.ndarray:
    name = draw.among("dtype", [*DTYPES, "mixed objects", "structured", "texts", "huge integers"], 0.8)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if name == "mixed objects":
            odd = [None, "a", 1, 2.5, [1], {}, 10**400, True, Decimal(1), 1j]
            return np.array([odd[i] for i in draw.rng.integers(len(odd), size=x.size)] + [0], object)[:-1].reshape(
                x.shape
            )
        if name == "structured":
            return np.zeros(x.shape, [("a", "f8"), ("b", "i4")])
        if name == "texts":
            return x.astype("U20")
        if name == "huge integers":
            return np.full(x.shape, 2**64 - 1, "u8") - (x > 0).astype("u8")
        if np.dtype(name).kind in "mMV":
            return np.zeros(x.shape, name)
        return x.astype(name)


def laid_out(draw: Draw, x: np.ndarray) -> np.ndarray:
    def read_only() -> np.ndarray:
        x.flags.writeable = False
        return x

    def misaligned() -> np.ndarray:
        if x.dtype.hasobject:
            return x
        data = np.empty(x.nbytes + 1, "u1")
        out = data[1:].view(x.dtype).reshape(x.shape)
        out[...] = x
        return out

    choices: Choices = {
        "C": lambda: x,
        "Fortran": lambda: np.asfortranarray(x),
        "backwards": lambda: x[::-1] if x.ndim else x,
        "every second": lambda: x[::2] if x.ndim else x,
        "mirrored": lambda: x[..., ::-1] if x.ndim else x,
        "transposed": lambda: x.T,
        "broadcast": lambda: np.broadcast_to(x, (6, *x.shape[1:])) if x.shape[:1] in {(1,), (6,)} else x,
        "one row repeated": lambda: np.broadcast_to(x[:1], x.shape) if len(x.shape) and x.size else x,
        "read-only": read_only,
        "misaligned": misaligned,
    }
    return draw.of("layout", choices, 0.6)


def array(draw: Draw) -> np.ndarray:
    return laid_out(draw, typed(draw, values(draw, shape(draw))))


# -- containers --------------------------------------------------------------------------------------------------


class TheirError(Exception):
    """What the caller's own code raises: it comes through as it is."""


class Hostile:
    """An array-like that fails in its own way."""

    shape = (5, 2)

    def __len__(self) -> int:
        return 5

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TheirError("no array today")


def rows(draw: Draw) -> Any:
    """Rows in any container; what a container cannot hold stays an array."""
    x = array(draw)
    kind = draw.among("container", ["in memory", "plain", "dask", "zarr", "frame", "scipy", "other"], 0.4)
    makers = {"plain": plain, "dask": lazy, "zarr": store, "frame": frame, "scipy": scientific, "other": nothing_like}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return makers[kind](draw, x) if kind in makers else x
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError):
            draw.words.append("(an array after all)")
            return x


def plain(draw: Draw, x: np.ndarray) -> Any:
    choices: Choices = {
        "list": lambda: x.tolist(),
        "tuple of rows": lambda: tuple(x),
        "ragged": lambda: [[1.0, 2.0], [3.0], []],
        "deep": lambda: [[[[[1.0]]]]],
        "set": lambda: {1, 2},
        "dict": lambda: {"a": x},
        "generator": lambda: (row for row in x),
        "memoryview": lambda: memoryview(np.ascontiguousarray(x)),
    }
    return draw.of("in", choices)


def nothing_like(draw: Draw, x: np.ndarray) -> Any:
    choices: Choices = {
        "None": lambda: None,
        "a number": lambda: 3.5,
        "a huge integer": lambda: 10**400,
        "bytes": lambda: b"rows.zarr",
        "empty text": lambda: "",
        "a missing path": lambda: "/nowhere/at/all.zarr",
        "a missing Path": lambda: Path("no") / "where",
        "a path with NUL": lambda: "a\0b",
        "a lone surrogate": lambda: "a\ud800b",
        "a long path": lambda: "x" * 5000,
        "a folder that is no store": lambda: os.fspath(draw.folder.parent),
        "this file": lambda: __file__,
        "a URL of no scheme": lambda: "nosuch://host/rows",
        "an open file": lambda: io.BytesIO(b"123"),
        "a class": lambda: GaussianMixture,
        "a model": lambda: KNOWN,
        "an ellipsis": lambda: ...,
        "hostile": Hostile,
        "a zarr group": lambda: zarr.create_group(store={}),
    }
    return draw.of("instead", choices)


def frame(draw: Draw, x: np.ndarray) -> Any:
    def renamed(names: Any) -> Any:
        found = pd.DataFrame(x)
        found.columns = list(itertools.islice(itertools.cycle(names), found.shape[1]))
        return found

    choices: Choices = {
        "frame": lambda: pd.DataFrame(x),
        "named": lambda: renamed(["a", "b", "c"]),
        "names repeat": lambda: renamed(["a"]),
        "names of two types": lambda: renamed(["a", 1]),
        "nullable": lambda: pd.DataFrame(x).convert_dtypes(),
        "float with NA": lambda: pd.DataFrame(x).astype("Float64").mask(pd.DataFrame(x) > 0.5),
        "categories": lambda: pd.DataFrame(np.round(x.astype(float))).astype("category"),
        "a series": lambda: pd.Series(x.reshape(-1)),
        "dates": lambda: pd.DataFrame({"a": pd.date_range("2020", periods=5), "b": 1.0}),
        "sparse columns": lambda: pd.DataFrame(x).astype(pd.SparseDtype("float64", 0.0)),
    }
    return draw.of("as", choices)


def scientific(draw: Draw, x: np.ndarray) -> Any:
    choices: Choices = {
        "csr matrix": lambda: scipy.sparse.csr_matrix(x),
        "coo array": lambda: scipy.sparse.coo_array(x),
        "masked": lambda: np.ma.masked_array(x, draw.rng.random(x.shape) < 0.2),
        "nothing masked": lambda: np.ma.masked_array(x),
        "matrix": lambda: np.matrix(x),
    }
    return draw.of("as", choices)


def lazy(draw: Draw, x: np.ndarray) -> Any:
    def cut(size: int) -> tuple[int, ...]:
        ends = np.sort(draw.rng.integers(0, size + 1, int(draw.rng.integers(0, 4))))
        return tuple(int(n) for n in np.diff([0, *ends, size]))  # some are empty

    whole = da.from_array(np.ascontiguousarray(x), chunks=tuple(map(cut, x.shape)))
    choices: Choices = {
        "odd chunks": lambda: whole,
        "unknown sizes": lambda: whole[da.from_array(np.arange(len(x)) % 3 > 0, chunks=whole.chunks[:1])],
        "nothing left": lambda: whole[(whole[:, 0] != whole[:, 0])],
        "unknown columns": lambda: whole[:, whole[0] * 0 == 0],
        "a task that fails": lambda: whole.map_blocks(_fail, dtype=float, meta=np.empty((0, 0))),
        "another shape than said": lambda: whole.map_blocks(lambda block: block[:1], dtype=x.dtype),
        "delayed": lambda: dask.delayed(x),
        "a list of two": lambda: [whole, whole],
    }
    return draw.of("lazy", choices, 0.3)


def _fail(block: Any) -> Any:
    raise TheirError("broken task")


# -- stores ------------------------------------------------------------------------------------------------------


def store(draw: Draw, x: np.ndarray) -> Any:
    """A zarr array, sound or damaged, by its path or open."""
    path = stored(draw, x)
    choices: Choices = {
        "path": lambda: os.fspath(path),
        "Path": lambda: path,
        "open": lambda: zarr.open_array(path, mode="r"),
        "its group": lambda: zarr.open_group(draw.folder, mode="r"),
        "the group's path": lambda: os.fspath(draw.folder),
        "file URL": lambda: f"file://{path}",
        "bytes path": lambda: os.fsencode(path),
    }
    return draw.of("given as", choices, 0.4)


def stored(draw: Draw, x: np.ndarray) -> Path:
    """The path of the array "x" in a group, perhaps damaged."""
    form = draw.among("zarr", ["v3", "sharded", "v2"])
    chunks = tuple(int(draw.rng.integers(1, size + 2)) for size in x.shape)
    shards = tuple(2 * size for size in chunks) if form == "sharded" else None
    version = 2 if form == "v2" else 3
    group = zarr.open_group(draw.folder, mode="w", zarr_format=version)
    fill = draw.among("fill value", [0, 1], 0.8) if x.dtype.kind in "iuf" else None
    made = group.create_array("x", shape=x.shape, dtype=x.dtype, chunks=chunks, shards=shards, fill_value=fill)
    made[...] = x
    path = draw.folder / "x"
    metadata = path / (".zarray" if version == 2 else "zarr.json")
    chunk_files = sorted(p for p in path.rglob("*") if p.is_file() and p != metadata and p.name != ".zattrs")
    some = [p for p in chunk_files if draw.rng.random() < 0.3] or chunk_files[:1]

    def every(change: Callable[[Path], Any]) -> None:
        for one in some:
            change(one)

    text = metadata.read_text()
    attributes = draw.rng.choice(["scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned"])
    odd_values = [2.0, 0, None, "x", [1, 2], [[]], "true", 1e308, {}, float("nan"), 10**400]
    choices: Choices = {
        "none": lambda: None,
        "chunks gone": lambda: every(Path.unlink),
        "chunks empty": lambda: every(lambda one: one.write_bytes(b"")),
        "chunks cut": lambda: every(lambda one: one.write_bytes(one.read_bytes()[:-1])),
        "chunks garbage": lambda: every(lambda one: one.write_bytes(draw.rng.bytes(40))),
        "chunks are folders": lambda: every(lambda one: (one.unlink(), one.mkdir())),
        "metadata gone": lambda: metadata.unlink(),
        "metadata empty": lambda: metadata.write_text(""),
        "metadata a list": lambda: metadata.write_text("[]"),
        "metadata deep": lambda: metadata.write_text("[" * 100_000),
        "metadata cut": lambda: metadata.write_text(text[: int(draw.rng.integers(len(text)))]),
        "shape larger": lambda: metadata.write_text(text.replace(f"{x.shape[0]},", "1000000000000,", 1)),
        "chunks of zero": lambda: metadata.write_text(text.replace(f"{chunks[0]},", "0,")),
        "another codec": lambda: metadata.write_text(text.replace("zstd", "pickle")),
        "attribute": lambda: made.attrs.update({str(attributes): draw.among("value", odd_values)}),
    }
    draw.of("damage", choices, 0.5)
    return path
