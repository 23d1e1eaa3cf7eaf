"""What a pass costs beside a bare read of every chunk and BLAS's two matrix products.

    python benchmarks/floor.py                                 # the grid in memory and from zarr, ten minutes
    python benchmarks/floor.py --shapes 8x16 --megabytes 32    # quick and rough

The products are those of the packed form taken alone, k x F times F x b and k x b times b x F for tiles of b rows, with
one BLAS thread in each thread and the tile that is fastest for them. A bare read takes each chunk with zarr, in as many
threads as the pass, and drops it. All take turns in one run; each figure is the median over the rounds.

Prints for rows in memory the products over the E-step with one thread and with two, and one thread over two; and from a
store with zarr's default compression (bare read + products) over the pass, with two threads. The next column tells how
much two threads bring where nothing is shared: the products themselves. "by tiles" is the time of the same E-step
without the compiled loops, tile by tile in NumPy, over that with them, with two threads; "by BLAS" that of the loops
without fused products, which are for few components, where a pass can be faster than BLAS's products alone. For single
precision: how much faster one thread is than with double, the kinds of number in both products, and the share of rows
that its guard leaves to double precision or to the centred form. Last of all, what the loops cost a process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import zarr
from cluster import seconds_of
from peer_worker import unit_covariances
from peers import GRID, shape

from streamgmm.covariance import FullCovariance
from streamgmm.executors import single_blas_thread
from streamgmm.kernel import SINGLE_GUARD_LIMIT, Scorer, e_step, prepare
from streamgmm.loops import PANEL_ROWS
from streamgmm.params import MixtureParams

TILES = (256, 512, 1024, 2048, 4096)
CHUNK_BYTES = 8 * 2**20


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def products(n: int, n_moments: int, k: int, tile: int, threads: int) -> float:
    """Seconds of the two products over n rows, shared by threads that have buffers of their own."""
    rng = np.random.default_rng(0)

    def work(_: int) -> None:
        features, eta = rng.random((n_moments, tile)), rng.random((k, n_moments))
        joint = np.empty((k, tile))
        for _ in range(-(-n // (tile * threads))):
            np.matmul(eta, features, out=joint)
            joint @ features.T

    with single_blas_thread(), ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(work, range(threads))))


def best_tile(n_moments: int, k: int) -> int:
    return min(TILES, key=lambda tile: min(products(4 * max(TILES), n_moments, k, tile, 1) for _ in range(3)))


def bare_read(path: Path, threads: int, step: int | None = None) -> float:
    """Seconds to read a store ``step`` rows at a time, by default a chunk."""
    array = zarr.open_array(path, mode="r")
    step = step or array.chunks[0]

    def read(start: int) -> None:
        array[start : start + step]

    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(read, range(0, array.shape[0], step))))


def unit_clusters(d: int, k: int, megabytes: float) -> tuple[np.ndarray, MixtureParams]:
    """Rows of clusters of variance one, and a mixture near them."""
    rng = np.random.default_rng(0)
    means = 2.0 * rng.normal(size=(k, d))
    n = round(megabytes * 2**20 / (8 * d))
    rows = means[rng.integers(k, size=n)] + rng.normal(size=(n, d))
    near = means + 0.1 * rng.normal(size=(k, d))
    return rows, MixtureParams(np.full(k, 1.0 / k), near, FullCovariance(unit_covariances(k, d, "full")))


def share_left_to_double(rows: np.ndarray, scorer: Scorer) -> float:
    """The share of rows in panels that single precision refuses."""
    if not scorer.single:
        return 1.0
    limit = SINGLE_GUARD_LIMIT / np.finfo(np.float32).eps
    far = ((rows - scorer.frame.shift) * scorer.frame.scale) ** 2 @ scorer.reach > limit
    panels = [far[start : start + PANEL_ROWS] for start in range(0, len(far), PANEL_ROWS)]
    return sum(len(panel) for panel in panels if panel.any()) / len(rows)


def by_tiles(*arguments: Any) -> float:
    """Seconds of a pass without the compiled loops."""
    with patch("streamgmm.kernel._lenses", lambda scorer: []):
        return seconds_of(*arguments)


def by_blas(*arguments: Any) -> float:
    """Seconds of a pass whose two products are BLAS's for few components as well."""
    with patch("streamgmm.loops.MOST_FUSED", 0):
        return seconds_of(*arguments)


def measured(rows: np.ndarray, params: MixtureParams, rounds: int) -> dict[str, float]:
    """Seconds by what is timed, the median over the rounds."""
    (n, d), k = rows.shape, len(params.weights)
    n_moments = 1 + d + d * (d + 1) // 2
    scorers, single = ((prepare(params, params.frame(), single=single),) for single in (False, True))
    tile = best_tile(n_moments, k)
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.zarr")
        zarr.create_array(path, data=rows, chunks=(CHUNK_BYTES // (8 * d), d))
        timed = {
            "products, 1": partial(products, n, n_moments, k, tile, 1),
            "E-step, 1": partial(seconds_of, "threads", e_step, scorers, rows, 1),
            "single, 1": partial(seconds_of, "threads", e_step, single, rows, 1),
            "products, 2": partial(products, n, n_moments, k, tile, 2),
            "E-step, 2": partial(seconds_of, "threads", e_step, scorers, rows, 2),
            "by tiles, 2": partial(by_tiles, "threads", e_step, scorers, rows, 2),
            "by BLAS, 2": partial(by_blas, "threads", e_step, scorers, rows, 2),
            "bare read": partial(bare_read, path, 2),
            "pass": partial(seconds_of, "threads", e_step, scorers, str(path), 2),
        }
        for call in timed.values():
            call()  # what is made once is made
        found: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(rounds):
            for name, call in timed.items():
                found[name].append(call())
    return {name: median(values) for name, values in found.items()}


def row(d: int, k: int, found: dict[str, float], left: float) -> str:
    one, two = (found[f"products, {threads}"] / found[f"E-step, {threads}"] for threads in (1, 2))
    threads = found["E-step, 1"] / found["E-step, 2"]
    floor = (found["bare read"] + found["products, 2"]) / found["pass"]
    possible = found["products, 1"] / found["products, 2"]
    single, kind = found["E-step, 1"] / found["single, 1"], "float32" if left < 1 else "float64"
    tiles, blas = (found[f"by {what}, 2"] / found["E-step, 2"] for what in ("tiles", "BLAS"))
    beside = f"{tiles:8.2f} {blas:7.2f}  {single:6.2f}  {kind}, {kind}  {left:8.1%}"
    return f"{d:3d} {k:3d}  {one:8.2f} {two:8.2f}  {threads:9.2f}  {floor:9.2f}  {possible:9.2f}  {beside}"


COST = """
import time
import numpy, scipy.linalg
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024
before, began = resident(), time.perf_counter()
from streamgmm import loops
print(time.perf_counter() - began, resident() - before)
"""


def cost_of_the_loops() -> tuple[float, float]:
    """Seconds and MB that importing them takes in a process that has NumPy and SciPy."""
    printed = subprocess.run([sys.executable, "-c", COST], check=True, capture_output=True, text=True).stdout
    took, megabytes = printed.split()
    return float(took), float(megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, default=GRID, help="dxk; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=256.0, help="of rows")
    arguments = parser.parse_args()
    heads = f"{'E-step':>9}  {'from zarr':>9}  {'products':>9}  {'':16}  {'single precision':^34}"
    print(f"{'':7}  {'products : E-step':^17}  {heads}")
    heads = f"{'by tiles':>8} {'by BLAS':>7}  {'faster':>6}  {'products':^16}  {'left':>8}"
    print(f"{'d':>3} {'k':>3}  {'1 thread':>8} {'2':>8}  {'1 : 2':>9}  {'floor':>9}  {'1 : 2':>9}  {heads}")
    gains = []
    for d, k in arguments.shapes:
        rows, params = unit_clusters(d, k, arguments.megabytes)
        found = measured(rows, params, arguments.rounds)
        left = share_left_to_double(rows, prepare(params, params.frame(), single=True))
        gains.append(found["E-step, 1"] / found["single, 1"])
        print(row(d, k, found, left), flush=True)
    print(f"single precision: {geometric_mean(gains):.2f} times as fast in geometric mean")
    print("the loops cost a process {:.3f} s and {:.1f} MB".format(*cost_of_the_loops()))


if __name__ == "__main__":
    main()
