"""Does one far row slow a fit? Seconds of a fit with one outlier over seconds of the same fit without.

    python benchmarks/outlier.py              # about three minutes
    python benchmarks/outlier.py --rounds 1   # quick and rough

The outlier is a glitch in one feature. Both fits find their own start and make the same number of passes, one after the
other in turns; each ratio is the median over the rounds of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median

import numpy as np

from streamgmm import GaussianMixture

D, K, N = 8, 16, 200_000
PASSES = 8
SIZES = [1e4, 1e8, 1e12, 1e100]
STRUCTURES = ["full", "tied", "diag", "spherical"]


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    means = 2.0 * rng.normal(size=(K, D))
    return means[rng.integers(K, size=N)] + rng.normal(size=(N, D))


def seconds(x: np.ndarray, structure: str) -> float:
    """One fit of exactly PASSES passes."""
    model = GaussianMixture(K, covariance_type=structure, tol=0.0, max_iter=PASSES, random_state=0, solver="em")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        model.fit(x)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    clean = rows()
    print(f"{N:,} rows, d = {D}, k = {K}, {PASSES} passes; seconds with one outlier over seconds without")
    print("structure  " + "  ".join(f"{size:>8.0e}" for size in SIZES))
    for structure in STRUCTURES:
        ratios = []
        for size in SIZES:
            spoilt = clean.copy()
            spoilt[N // 3, 0] = size
            pairs = [(seconds(spoilt, structure), seconds(clean, structure)) for _ in range(rounds)]
            ratios.append(median(slow / fast for slow, fast in pairs))
        print(f"{structure:9s}  " + "  ".join(f"{ratio:8.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
