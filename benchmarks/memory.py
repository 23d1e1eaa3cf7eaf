"""Peak memory of a fit as the data grow: a small store and a large one, each fitted in a fresh process.

    python benchmarks/memory.py                       # 1 GB and 8 GB; writes 9 GB into a temporary directory
    python benchmarks/memory.py --gigabytes 0.1 0.8   # the short form
    python benchmarks/memory.py --directory /data     # keeps the stores there and uses them again

The peak is VmHWM, the most that the kernel ever counted as resident for that process: libraries, threads and all.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import zarr

D, K, CHUNK_ROWS, PASSES = 8, 16, 65_536, 3
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def store_of(directory: Path, gigabytes: float) -> Path:
    """A store of float64 rows, written chunk by chunk, so that writing it takes no memory either."""
    path = directory / f"rows-{gigabytes:g}GB.zarr"
    if path.exists():
        return path
    n_rows = round(gigabytes * 1e9 / (8 * D))
    unfinished = path.with_suffix(".part")
    array = zarr.create_array(unfinished, shape=(n_rows, D), chunks=(CHUNK_ROWS, D), dtype="float64", overwrite=True)
    means = np.random.default_rng(0).normal(scale=3.0, size=(K, D))
    for start in range(0, n_rows, CHUNK_ROWS):
        rng = np.random.default_rng([1, start])
        size = min(CHUNK_ROWS, n_rows - start)
        rows = rng.standard_normal((size, D))
        rows += means[rng.integers(K, size=size)]
        array[start : start + size] = rows
    unfinished.rename(path)
    return path


def fit_and_measure(path: str, threads: int) -> dict[str, float]:
    """Fit in this process; its peak and the peak that the plan printed, in bytes."""
    import logging
    import warnings

    import dask

    from streamgmm import GaussianMixture

    lines: list[str] = []
    logger = logging.getLogger("streamgmm")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    model = GaussianMixture(K, solver="em", max_iter=PASSES, tol=0.0, random_state=0)
    with warnings.catch_warnings(), dask.config.set(scheduler="threads", num_workers=threads):
        warnings.simplefilter("ignore")  # three passes do not converge, and need not
        model.fit(path)
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    number, unit = re.search(r"peak memory at most ([\d.]+) (\w+)", lines[0]).groups()  # type: ignore[union-attr]
    return {"peak": peak, "planned": float(number) * UNITS[unit], "n_passes": model.n_passes_}


def measure(path: Path, threads: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--fit", str(path), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(directory: Path, sizes: list[float], threads: int) -> None:
    print(f"d = {D}, k = {K}, {threads} threads, {PASSES} passes after the pilot, chunks of {CHUNK_ROWS:,} rows")
    print(f"{'data':>9}  {'peak':>9}  {'planned':>9}  {'to the first':>12}")
    first = 0.0
    for gigabytes in sizes:
        figures = measure(store_of(directory, gigabytes), threads)
        first = first or figures["peak"]
        print(
            f"{gigabytes:6g} GB  {figures['peak'] / 1e6:6.1f} MB  {figures['planned'] / 1e6:6.1f} MB  "
            f"{figures['peak'] / first:12.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 8.0], help="sizes of the data")
    parser.add_argument("--directory", type=Path, help="where stores are kept; a temporary place by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", metavar="STORE", help="fit this one store in this process and print the figures")
    arguments = parser.parse_args()
    if arguments.fit:
        print(json.dumps(fit_and_measure(arguments.fit, arguments.threads)))
    elif arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        compare(arguments.directory, arguments.gigabytes, arguments.threads)
    else:
        with tempfile.TemporaryDirectory() as directory:
            compare(Path(directory), arguments.gigabytes, arguments.threads)


if __name__ == "__main__":
    main()
