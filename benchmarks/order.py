"""Does it matter in which order the rows lie on disk?

    python benchmarks/order.py --results order.jsonl --jobs 2                             # all of it: hours
    python benchmarks/order.py --results order.jsonl --cells 'gaussian-d2-*' --seeds 2    # a short form

The rows of the cells of benchmarks/reads.py, sorted by their first feature and shuffled, from the same given start: the
optimum of a sample of the sorted ones. (From a given start the sample is drawn by what rows hold, and digits that
depend on the order of additions are left out of what a read tells; what this cannot exclude is counted here.)

Prints for each cell the largest difference of the mean log-likelihood (nats a row) of the two fits over the seeds, with
tol=1e-8 and, as a multiple of tol, with the default; the reads of both (median, worst); and whether the differences are
within what is asked: 1e-6 nats, and 2 tol. Where one is not, both fits are continued by EM on all rows: "own gap" is
the largest of what that gained. Where it is small, the two lie at different optima, and neither was ended too early.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from cells import CELLS, Cell, Stored, stored
from optimum import continued, in_memory, log_likelihood, params_of
from results import Line, measure, parser

from streamgmm import GaussianMixture
from streamgmm.params import MixtureParams

METHODS = ["order"]
TOLERANCES = {"tight": 1e-8, "default": None}
#: Nats a row with the tight tol; multiples of tol with the default.
LIMITS = {"tight": 1e-6, "default": 2.0}
MOST_PASSES = 500


def work(cell: Cell, seed: int, methods: list[str]) -> Iterator[Line]:
    """One line: the likelihoods that fits of the sorted and of the shuffled rows end at, and their reads."""
    began = time.perf_counter()
    rows = cell.rows(seed)
    m = cell.sample_rows(len(rows))
    everything = in_memory(rows)
    found: dict[str, dict[str, Any]] = {name: {"likelihoods": [], "reads": []} for name in TOLERANCES}
    ends: dict[str, list[MixtureParams]] = {name: [] for name in TOLERANCES}
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    with stored(rows) as in_order, stored(shuffled) as in_disorder:
        start = GaussianMixture(cell.k, sample_rows=m, tol=0.0, max_iter=0, random_state=seed).fit(in_order.array)
        in_order.reads()
        given = {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}
        for name, tol in TOLERANCES.items():
            for data in (in_order, in_disorder):
                model = _fitted(cell, data, m, tol, seed, given)
                ends[name].append(params_of(model))
                found[name]["likelihoods"].append(log_likelihood(everything, params_of(model)))
                found[name]["reads"].append(model.n_passes_)
    line = {"method": "order", "n": len(rows), "tol": 0.1 * cell.unit(len(rows)), **found}
    for name, limit in LIMITS.items():
        if difference(line, name) > limit:
            line[name]["gaps"] = [continued(everything, params).gap for params in ends[name]]
    yield {**line, "seconds": round(time.perf_counter() - began, 2)}


def _fitted(cell: Cell, data: Stored, m: int, tol: float | None, seed: int, given: dict[str, Any]) -> GaussianMixture:
    settings = {"sample_rows": m, "tol": tol, "max_iter": MOST_PASSES, "random_state": seed, **given}
    model = GaussianMixture(cell.k, **settings).fit(data.array)
    assert data.reads() == model.n_passes_
    return model


def difference(line: Line, name: str) -> float:
    """Nats a row; with the default tol in multiples of it."""
    first, second = line[name]["likelihoods"]
    return abs(first - second) / _unit(line, name)


def own_gap(line: Line, name: str) -> float:
    """What EM would still have gained, of the fit that it gains most on, in the same unit; 0 where nobody asked."""
    return max(line[name].get("gaps", [0.0])) / _unit(line, name)


def _unit(line: Line, name: str) -> float:
    return line["tol"] if name == "default" else 1.0


def summary(lines: list[Line], name: str, limit: float) -> str:
    """One half of a row of the table."""
    worst = max(difference(line, name) for line in lines)
    reads = np.array([line[name]["reads"] for line in lines])
    gap = max(own_gap(line, name) for line in lines)
    met = "yes" if worst <= limit else "NO"
    return f"{worst:10.1e} {f'{gap:.1e}' if gap else '-':>7} {np.median(reads):6.1f} {reads.max():6d} {met:>3}"


def main() -> None:
    arguments = parser(__doc__).parse_args()
    lines = measure(arguments, work, METHODS)
    print(f"{'':22} {'':5}  {'tol=1e-8':^37}  {'default tol':^37}")
    print(f"{'cell':22} {'seeds':>5}" + f"  {'difference':>10} {'own gap':>7} {'reads':>6} {'worst':>6} met" * 2)
    for cell in CELLS:
        mine = [line for line in lines if line["cell"] == cell.name]
        if mine:
            halves = "  ".join(summary(mine, name, limit) for name, limit in LIMITS.items())
            print(f"{cell.name:22} {len(mine):5d}  {halves}")
    for name, limit in LIMITS.items():
        met = sum(difference(line, name) <= limit for line in lines)
        print(f"{name} tol: {met} of {len(lines)} within {limit:g} {'tol' if name == 'default' else 'nats'}")


if __name__ == "__main__":
    main()
