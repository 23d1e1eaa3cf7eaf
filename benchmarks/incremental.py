"""How near is incremental EM to the optimum after ten passes over rows that are sorted by component?

    python benchmarks/incremental.py                          # 10 seeds of 200,000 rows: about five minutes
    python benchmarks/incremental.py --seeds 2 --rows 60000   # the short form

Rows of a known mixture lie in 40 blocks, sorted by the component that they come from. A model is fitted to convergence
on a random 5 % of them; from it ten passes of incremental EM go on, ten of textbook EM, and textbook EM until it stands
still. The gap is how far the mean log-likelihood (nats a row) is below that of the last.
"""

from __future__ import annotations

import argparse
import warnings
from statistics import median
from typing import Any

import numpy as np

from streamgmm import GaussianMixture, open_source
from streamgmm.synthetic import random_mixture

D, K, SEPARATION = 5, 8, 1.5
BLOCKS, PASSES, PART = 40, 10, 0.05


def sorted_rows(n: int, seed: int) -> np.ndarray:
    rows, labels = random_mixture(K, D, SEPARATION, seed).rows(n, seed)
    return rows[np.argsort(labels, kind="stable")]


def fitted(rows: Any, solver: str, max_iter: int, tol: float = 0.0, start: GaussianMixture | None = None) -> Any:
    given = {}
    if start is not None:
        given = {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}
    model = GaussianMixture(K, solver=solver, tol=tol, max_iter=max_iter, random_state=0, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten passes do not converge, and need not
        return model.fit(rows)


def gaps(n: int, seed: int) -> tuple[float, float]:
    """Of incremental and of textbook EM after PASSES passes from the same start."""
    rows = sorted_rows(n, seed)
    sample = np.sort(np.random.default_rng(seed).choice(n, round(PART * n), replace=False))
    start = fitted(rows[sample], "em", 5_000, tol=1e-8)
    blocks = open_source(rows, block_rows=-(-n // BLOCKS))
    best = fitted(rows, "em", 5_000, tol=1e-9, start=start).score(rows)
    incremental, textbook = (fitted(blocks, solver, PASSES, start=start) for solver in ("incremental", "em"))
    return best - incremental.score(rows), best - textbook.score(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=200_000)
    arguments = parser.parse_args()
    print(f"k = {K}, d = {D}, separation {SEPARATION}, {arguments.rows:,} sorted rows in {BLOCKS} blocks")
    print(f"gap (nats a row) after {PASSES} passes\n{'seed':>6}  {'incremental':>11}  {'em':>9}")
    found = []
    for seed in range(arguments.seeds):
        found.append(gaps(arguments.rows, seed))
        print(f"{seed:6d}  {found[-1][0]:11.2e}  {found[-1][1]:9.2e}", flush=True)
    first, second = (median(column) for column in zip(*found, strict=True))
    print(f"median  {first:11.2e}  {second:9.2e}")


if __name__ == "__main__":
    main()
