"""Seconds an iteration of EM in memory: scikit-learn over streamgmm, and one thread over two.

    python benchmarks/speed.py              # the whole grid, about a quarter of an hour
    python benchmarks/speed.py --rounds 1   # quick and rough

Both fit the same rows from the same start, one after the other in turns, so that what else the machine does falls on
both alike. An iteration is the difference of a long and a short fit, which leaves out the start, checks and the read
before fitting. Each ratio is the median over the rounds of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import dask
import numpy as np
from sklearn.mixture import GaussianMixture as SklearnMixture

from streamgmm import GaussianMixture

SHAPES = [(2, 8), (8, 16), (16, 32), (64, 16)]
STRUCTURES = ["full", "tied", "diag", "spherical"]
SHORT, LONG = 1, 4
TARGET_SECONDS = 1.0


def start(d: int, k: int, structure: str) -> dict[str, Any]:
    """A given start, the same for both."""
    shapes = {"full": np.stack([np.eye(d)] * k), "tied": np.eye(d), "diag": np.ones((k, d)), "spherical": np.ones(k)}
    means = 2.0 * np.random.default_rng(1).normal(size=(k, d))
    return {"weights_init": np.full(k, 1.0 / k), "means_init": means, "precisions_init": shapes[structure]}


def rows(n: int, d: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    means = 2.0 * np.random.default_rng(1).normal(size=(k, d))
    return means[rng.integers(k, size=n)] + rng.normal(size=(n, d))


def seconds(model: type, x: np.ndarray, k: int, structure: str, max_iter: int) -> float:
    """One fit from the given start, of exactly ``max_iter`` iterations."""
    settings = {"covariance_type": structure, "tol": 0.0, "max_iter": max_iter, **start(x.shape[1], k, structure)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        model(k, **settings).fit(x)
        return time.perf_counter() - began


def iteration(model: type, x: np.ndarray, k: int, structure: str) -> float:
    long, short = (seconds(model, x, k, structure, max_iter) for max_iter in (LONG, SHORT))
    return max(long - short, 1e-9) / (LONG - SHORT)


def on_threads(threads: int, call: Callable[[], float]) -> float:
    with dask.config.set(scheduler="threads", num_workers=threads):
        return call()


def row_count(d: int, k: int, structure: str) -> int:
    """Rows for which scikit-learn takes about TARGET_SECONDS an iteration, at least a few of our blocks."""
    trial = rows(40_000, d, k)
    taken = iteration(SklearnMixture, trial, k, structure)
    return int(np.clip(40_000 * TARGET_SECONDS / taken, 8 * 262_144 // d, 2_000_000))


def compare(d: int, k: int, structure: str, rounds: int) -> str:
    x = rows(row_count(d, k, structure), d, k)
    figures = []
    for _ in range(rounds):
        theirs = iteration(SklearnMixture, x, k, structure)
        two = on_threads(2, lambda: iteration(GaussianMixture, x, k, structure))
        one = on_threads(1, lambda: iteration(GaussianMixture, x, k, structure))
        figures.append((theirs, one, two, theirs / one, theirs / two, one / two))
    theirs, one, two, over_one, over_two, threads = map(median, zip(*figures, strict=True))
    return (
        f"{structure:>9} {d:3d} {k:3d} {len(x):9,d}  {theirs:8.4f} {one:8.4f} {two:8.4f}  "
        f"{over_one:7.2f} {over_two:7.2f} {threads:7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    arguments = parser.parse_args()
    print(f"{'':>17} {'':>9}  {'seconds an iteration':^26}  {'how many times faster':^23}")
    print(
        f"{'':>9} {'d':>3} {'k':>3} {'rows':>9}  {'sklearn':>8} {'1 thread':>8} {'2':>8}  "
        f"{'1 thread':>7} {'2':>7} {'2 : 1':>7}"
    )
    for structure in arguments.structures:
        for d, k in SHAPES:
            print(compare(d, k, structure, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
