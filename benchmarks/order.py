"""Does it matter in which order the rows lie on disk?

    python benchmarks/order.py --results order.jsonl --jobs 2                             # all of it: hours
    python benchmarks/order.py --results order.jsonl --cells 'gaussian-d2-*' --seeds 2    # a short form

The rows of the cells of benchmarks/reads.py, sorted by their first feature and shuffled, from the same given start: the
optimum of a sample of the sorted ones. (Another order puts other rows into the sample, so the bits are not the same.)

Prints for each cell the largest difference of the mean log-likelihood (nats a row) of the two fits over the seeds, with
tol=1e-8 and, as a multiple of tol, with the default; the reads of both (median, worst); and whether the differences are
within what is asked: 1e-6 nats, and 2 tol.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from cells import CELLS, Cell, Stored, stored
from optimum import in_memory, log_likelihood, params_of
from results import Line, measure, parser

from streamgmm import GaussianMixture

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
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    with stored(rows) as in_order, stored(shuffled) as in_disorder:
        start = GaussianMixture(cell.k, sample_rows=m, tol=0.0, max_iter=0, random_state=seed).fit(in_order.array)
        in_order.reads()
        given = {"weights_init": start.weights_, "means_init": start.means_, "precisions_init": start.precisions_}
        for name, tol in TOLERANCES.items():
            for data in (in_order, in_disorder):
                model = _fitted(cell, data, m, tol, seed, given)
                found[name]["likelihoods"].append(log_likelihood(everything, params_of(model)))
                found[name]["reads"].append(model.n_passes_)
    yield {
        "method": "order",
        "n": len(rows),
        "tol": 0.1 * cell.unit(len(rows)),
        **found,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _fitted(cell: Cell, data: Stored, m: int, tol: float | None, seed: int, given: dict[str, Any]) -> GaussianMixture:
    settings = {"sample_rows": m, "tol": tol, "max_iter": MOST_PASSES, "random_state": seed, **given}
    model = GaussianMixture(cell.k, **settings).fit(data.array)
    assert data.reads() == model.n_passes_
    return model


def difference(line: Line, name: str) -> float:
    """Nats a row; with the default tol in multiples of it."""
    first, second = line[name]["likelihoods"]
    return abs(first - second) / (line["tol"] if name == "default" else 1.0)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    lines = measure(arguments, work, METHODS)
    print(f"{'':22} {'':5}  {'tol=1e-8':^29}  {'default tol':^29}")
    print(f"{'cell':22} {'seeds':>5}" + f"  {'difference':>10} {'reads':>6} {'worst':>6} met" * 2)
    for cell in CELLS:
        mine = [line for line in lines if line["cell"] == cell.name]
        if not mine:
            continue
        said = f"{cell.name:22} {len(mine):5d}"
        for name, limit in LIMITS.items():
            worst = max(difference(line, name) for line in mine)
            reads = np.array([line[name]["reads"] for line in mine])
            said += f"  {worst:10.1e} {np.median(reads):6.1f} {reads.max():6d} {'yes' if worst <= limit else 'NO':>3}"
        print(said)


if __name__ == "__main__":
    main()
