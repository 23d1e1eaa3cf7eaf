"""Data larger than the memory of a cluster: a mixture fitted on two small dask workers, with a performance report.

Shows that what a fit holds depends on the size of a chunk and not on that of the data: 0.8 GB of rows in a zarr store
are fitted and labelled by two workers of 350 MB each, with the same call that would run on threads. Dask's report of
what the workers did is written beside the results: open it in a browser and look for the tasks `estep` and `merge`.

    python examples/cluster.py DIRECTORY [ROWS]

Needs bokeh, which dask draws its report with (pip install "streamgmm[dashboard]"). Takes about a minute; fewer rows
than the 12,500,000 take less, and show less.
"""

import sys
from pathlib import Path

import numpy as np
import zarr
from distributed import Client, LocalCluster, performance_report

import streamgmm  # the estimator is imported when it is first used: the workers import this file, and never need it
from streamgmm.synthetic import random_mixture

ROWS, FEATURES, COMPONENTS, CHUNK_ROWS = 12_500_000, 8, 3, 62_500
WORKERS, MEMORY_LIMIT = 2, "350MB"


def write(path, truth, n_rows):
    """Rows of a known mixture, written chunk by chunk."""
    array = zarr.create_array(
        path, shape=(n_rows, FEATURES), chunks=(CHUNK_ROWS, FEATURES), dtype="float64", overwrite=True
    )
    start = 0
    for rows, _ in truth.chunks(n_rows, CHUNK_ROWS, seed=0):
        array[start : start + len(rows)] = rows
        start += len(rows)
    return array


def peak_bytes():
    """The most memory that this process ever had, from the kernel's own account; None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def main(directory, n_rows):
    directory.mkdir(parents=True, exist_ok=True)
    truth = random_mixture(COMPONENTS, FEATURES, 4.0, 0)
    rows = write(directory / "rows.zarr", truth, n_rows)
    options = {"n_workers": WORKERS, "threads_per_worker": 1, "memory_limit": MEMORY_LIMIT}
    with (
        LocalCluster(**options, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        memory = sum(worker["memory_limit"] for worker in client.scheduler_info()["workers"].values())
        print(f"{rows.nbytes / 1e6:.0f} MB of rows, {memory / 1e6:.0f} MB of memory in {WORKERS} workers")
        model = streamgmm.GaussianMixture(COMPONENTS, random_state=0)
        print(model.plan(rows))
        with performance_report(filename=directory / "report.html"):
            model.fit(rows)
            labels = streamgmm.write_rows(model.predict(rows), directory / "labels.zarr", overwrite=True)
        peaks = [peak / 1e6 for peak in client.run(peak_bytes).values() if peak]
    order = truth.match(model.means_)
    errors = np.abs(model.means_[order] - truth.means) / truth.deviations
    print(f"{model.n_passes_} reads, converged: {model.converged_}; largest peak of a worker: {max(peaks):.0f} MB")
    print(f"largest error of a mean: {errors.max():.4f} standard deviations; {labels.size:,} labels written")
    print(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("Say where to write: python examples/cluster.py DIRECTORY [ROWS]")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else ROWS)
