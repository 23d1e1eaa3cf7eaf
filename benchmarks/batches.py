"""How near does learning batch by batch come to a fit of all rows? Gaps in nats a row, over ten seeds.

    python benchmarks/batches.py              # about ten minutes
    python benchmarks/batches.py --seeds 2    # quick and rough

A gap is that between a model's log-likelihood on all rows and that of EM on all rows continued from it until passes
change it by less than 1e-10. k = 8, d = 5, separation 1.5, 200,000 rows in 40 batches of 5,000. Fits of some of the
rows begin at the moments of their true components, so that the figures tell of learning, not of the search for a start.

Shuffled: the start is a fit of the first 5 % of the rows; then all batches are learned once, and four times more.
Sorted: the rows lie component after component, and the start, a fit of a random 5 % of them, enters as pseudo-data.
Day by day: a batch a day, the start is a fit of the first two; the model is saved and loaded between the days, and
compared with a fit of all days too.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from statistics import median

import numpy as np
from optimum import optimum

from streamgmm import GaussianMixture, load
from streamgmm.synthetic import recipe

K, D, N, BATCH = 8, 5, 200_000, 5_000
SEPARATION = 1.5
FIRST = N // 20


def converged(rows: np.ndarray, labels: np.ndarray) -> GaussianMixture:
    """A fit of rows that begins at the moments of their true components."""
    means = np.stack([rows[labels == k].mean(axis=0) for k in range(K)])
    precisions = np.stack([np.linalg.inv(np.cov(rows[labels == k].T)) for k in range(K)])
    start = {"weights_init": np.bincount(labels) / len(labels), "means_init": means, "precisions_init": precisions}
    return GaussianMixture(K, solver="em", tol=1e-9, max_iter=2000, **start).fit(rows)


def gap(model: GaussianMixture, rows: np.ndarray) -> float:
    """What EM on all rows, continued from the model, gains."""
    return optimum(model, rows) - model.score(rows)


def learn(model: GaussianMixture, rows: np.ndarray, passes: int = 1) -> GaussianMixture:
    for _ in range(passes):
        for start in range(0, len(rows), BATCH):
            model.partial_fit(rows[start : start + BATCH])
    return model


def shuffled(seed: int) -> tuple[float, float, float]:
    """Gaps of the start, after one pass, and after five."""
    rows, labels = recipe(K, D, N, SEPARATION, seed)
    model = converged(rows[:FIRST], labels[:FIRST])
    gaps = [gap(model, rows)]
    for passes in (1, 4):
        gaps.append(gap(learn(model, rows, passes), rows))
    return tuple(gaps)


def sorted_rows(seed: int) -> tuple[float, float]:
    """The gap after one pass over sorted rows, and the smallest weight of a component over its true one."""
    rows, labels = recipe(K, D, N, SEPARATION, seed)
    fitted = converged(rows[:FIRST], labels[:FIRST])
    model = GaussianMixture.from_parameters(fitted.weights_, fitted.means_, fitted.covariances_)
    learn(model, rows[np.argsort(labels, kind="stable")])
    return gap(model, rows), float((model.weights_ / (np.bincount(labels) / N)).min())


def day_by_day(seed: int) -> tuple[float, float]:
    """The gap after 40 days, and what a fit of all days is better by, nats a row."""
    rows, labels = recipe(K, D, N, SEPARATION, 100 + seed)
    model = converged(rows[: 2 * BATCH], labels[: 2 * BATCH])
    with tempfile.TemporaryDirectory() as folder:
        for start in range(2 * BATCH, N, BATCH):
            model.partial_fit(rows[start : start + BATCH]).save(Path(folder, "model.sgmm"))
            model = load(Path(folder, "model.sgmm"))
    return gap(model, rows), converged(rows, labels).score(rows) - model.score(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    warnings.simplefilter("ignore")
    print("shuffled            start     one pass  five passes")
    gaps = []
    for seed in seeds:
        gaps.append(shuffled(seed))
        print(f"  seed {seed:3d}       " + "  ".join(f"{g:9.2e}" for g in gaps[-1]), flush=True)
    for name, of in (("median", median), ("worst", max)):
        print(f"  {name:8s}       " + "  ".join(f"{of(column):9.2e}" for column in zip(*gaps, strict=True)), flush=True)
    print("sorted: gap after one pass, smallest weight over the true one")
    found = [sorted_rows(seed) for seed in seeds]
    print(f"  median gap {median(g for g, _ in found):.2e}, worst {max(g for g, _ in found):.2e}")
    print(f"  smallest weight over the true one {min(w for _, w in found):.2f}", flush=True)
    print("day by day: gap, and what a fit of all days is better by")
    found = [day_by_day(seed) for seed in seeds]
    print("  gaps  " + "  ".join(f"{g:.1e}" for g, _ in found))
    print("  fit   " + "  ".join(f"{better:.1e}" for _, better in found))


if __name__ == "__main__":
    main()
