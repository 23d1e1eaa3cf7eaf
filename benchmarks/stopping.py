"""How many reads does a fit take by default, and how near to the optimum does it then stop?

    python benchmarks/stopping.py --results stopping.jsonl --jobs 2                             # all of it: hours
    python benchmarks/stopping.py --results stopping.jsonl --cells 'gaussian-d2-*' --seeds 2    # a short form

The cells are those of benchmarks/reads.py, and so are the samples; tol is the default, a tenth of U = P / 2n. The gap
is what EM on all rows gains when it is continued in memory from the model until it stands still.

Prints for each cell, and for all cells of a kind together, the reads (pilot included, counted by the store: median,
worst), the gap over tol (median, 90 % point, worst), fits that did not converge, and whether reads and gaps are within
what is asked of a kind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from cells import CELLS, Cell, stored
from optimum import continued, in_memory, params_of
from results import Line, measure, parser

from streamgmm import GaussianMixture

METHODS = ["default"]
#: Reads at the median, by kind of cell, where something is asked; the 90 % point of gap over tol outside real data.
MOST_READS = {"2": 5, "1.5": 5, "1": 7, "0.8": 9}
LARGEST_GAP, POINT = 1.5, 0.9


def work(cell: Cell, seed: int, methods: list[str]) -> Iterator[Line]:
    """One line: the reads of a default fit, and where EM goes on to from there."""
    rows = cell.rows(seed)
    m = cell.sample_rows(len(rows))
    with stored(rows) as data:
        began = time.perf_counter()
        model = GaussianMixture(cell.k, sample_rows=m, random_state=seed).fit(data.array)
        fitted = time.perf_counter()
        assert data.reads() == model.n_passes_
    end = continued(in_memory(rows), params_of(model))
    yield {
        "method": "default",
        "n": len(rows),
        "sample_rows": m,
        "reads": model.n_passes_,
        "tol": 0.1 * cell.unit(len(rows)),
        "likelihood": end.start,
        "optimum": end.end,
        "predicted_gap": model.history_[-1].predicted_gap,
        "converged": model.converged_,
        "rejected": sum(record.rejected for record in model.history_),
        "seconds": [round(fitted - began, 2), round(time.perf_counter() - fitted, 2)],
    }


class Figures(NamedTuple):
    """Of some lines: reads, and gaps over tol."""

    reads: float
    most_reads: int
    gap: float
    gap_point: float
    largest_gap: float

    @classmethod
    def of(cls, lines: list[Line]) -> Figures:
        reads = np.array([line["reads"] for line in lines])
        gaps = np.array([(line["optimum"] - line["likelihood"]) / line["tol"] for line in lines])
        median, point = np.quantile(gaps, [0.5, POINT])
        return cls(float(np.median(reads)), int(reads.max()), float(median), float(point), float(gaps.max()))


def row(name: str, lines: list[Line], kind: str | None) -> str:
    """kind: what the verdict is judged by; none where it is None."""
    found = Figures.of(lines)
    astray = sum(not line["converged"] for line in lines)
    said = (
        f"{name:22} {len(lines):5d}  {found.reads:5.1f} {found.most_reads:5d}  {found.gap:8.1e} "
        f"{found.gap_point:8.1e} {found.largest_gap:8.1e}  {astray:6d}"
    )
    if kind is None:
        return said
    few = found.reads <= MOST_READS.get(kind, np.inf)
    near = kind == "real" or found.gap_point <= LARGEST_GAP
    asked = f"{MOST_READS.get(kind, '-')} and {'-' if kind == 'real' else LARGEST_GAP}"
    return f"{said}  {asked:>9} {'yes' if few and near else 'NO':>3}"


def main() -> None:
    arguments = parser(__doc__).parse_args()
    lines = measure(arguments, work, METHODS)
    kinds = {cell.name: cell.kind for cell in CELLS}
    print(f"{'':22} {'':5}  {'reads':^11}  {'gap over tol':^26}")
    print(f"{'cell':22} {'fits':>5}  {'':5} {'worst':>5}  {'':8} {'90 %':>8} {'worst':>8}  astray      asked met")
    for name in kinds:
        mine = [line for line in lines if line["cell"] == name]
        if mine:
            print(row(name, mine, None))
    for kind in dict.fromkeys(kinds.values()):
        mine = [line for line in lines if kinds[line["cell"]] == kind]
        if mine:
            print(row(f"all of {kind}", mine, kind))


if __name__ == "__main__":
    main()
