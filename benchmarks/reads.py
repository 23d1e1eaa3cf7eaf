"""How near do a few reads come to the optimum: our solver, Anderson-accelerated EM and plain EM at equal reads?

    python benchmarks/reads.py --results reads.jsonl --jobs 2                             # all of it: hours
    python benchmarks/reads.py --results reads.jsonl --cells 'gaussian-d2-*' --seeds 2    # a short form

measured/reads.jsonl has what was measured, to go on from.

For each cell (a data set and a number of components) and seed the rows lie sorted on disk, and three methods go on from
the same optimum of a sample: 4 and 6 reads of the whole, the pilot read included, counted by the store. The gap is what
EM on all rows gains when it is continued in memory from the model of 6 reads until it stands still; the model of 4
reads is measured from the same optimum. All gaps are in units of U = P / 2n, the statistical error of the exact
estimate: n rows, P free parameters, m rows in the sample.

Prints for each cell and method the median and the worst gap over the seeds after 4 and 6 reads; what the optimum that
was reached lacks of the best one that any method has found on those rows (median, worst); for our solver steps on the
sample a fit, rejected reads, and whether the medians are within what is asked of them. "above" counts models of 4
reads that are better than the optimum they are measured from. Then how our medians compare with the other two.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
from cells import CELLS, Cell, Stored, stored
from optimum import REG_COVAR, continued, in_memory, log_likelihood, params_of
from results import Line, measure, parser

from streamgmm import GaussianMixture, open_source
from streamgmm.executors import executor_for, single_blas_thread
from streamgmm.params import MixtureParams
from streamgmm.pilot import take_pilot
from streamgmm.solvers.anderson import anderson
from streamgmm.solving import Rows

READS = (4, 6)
METHODS = ["auto", "anderson", "em"]
#: What the median gaps after 4 and 6 reads may be, in units of U, by kind of cell.
LIMITS = {
    "2": (0.05, 0.03),
    "1.5": (0.05, 0.03),
    "1": (0.2, 0.1),
    "0.8": (0.4, 0.15),
    "other shapes": (0.05, 0.03),
    "real": (1.5, 0.5),
}
#: Our median over the better of the other two, at most.
LARGEST_RATIO = 1.5
#: Share of cells where our median must be below both others; share of reads that may be rejected.
LEAST_CELLS, MOST_REJECTED = 0.9, 0.03
#: Nats a row to which an optimum is known: gaps below it are the same.
RESOLUTION = 1e-10


# -- one fit -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What a method gave.  passes: reads beside the pilot."""

    params: MixtureParams
    passes: int
    inner_steps: int = 0
    rejected: int = 0


def by_auto(cell: Cell, data: Stored, seed: int, reads: int) -> Fitted:
    """reads=1 is the optimum of the sample, which the others go on from."""
    m = cell.sample_rows(data.array.shape[0])
    model = GaussianMixture(cell.k, sample_rows=m, tol=0.0, max_iter=reads - 1, random_state=seed).fit(data.array)
    passes = [record for record in model.history_ if record.iteration > 0]
    return Fitted(
        params_of(model),
        len(passes),
        sum(record.inner_steps for record in passes),
        sum(record.rejected for record in passes),
    )


def by_em(cell: Cell, data: Stored, start: MixtureParams, reads: int) -> Fitted:
    precisions = np.linalg.inv(start.covariance.dense(cell.k, cell.d))
    given = {"weights_init": start.weights, "means_init": start.means, "precisions_init": precisions}
    model = GaussianMixture(cell.k, solver="em", tol=0.0, max_iter=reads - 1, **given).fit(data.array)
    return Fitted(params_of(model), model.n_passes_ - 1)


def by_anderson(cell: Cell, data: Stored, start: MixtureParams, reads: int) -> Fitted:
    source = open_source(data.array)
    with single_blas_thread(), executor_for(source) as executor:
        pilot = take_pilot(source, executor, np.empty(0, dtype=np.int64))
        rows = Rows(source, executor, pilot.frame(isotropic=False))
        found = anderson(rows.read_one, start, tol=0.0, max_iter=reads - 1, reg_covar=REG_COVAR)
    return Fitted(found.params, found.n_passes)


# -- a cell and a seed ---------------------------------------------------------------------------------------------


def work(cell: Cell, seed: int, methods: list[str]) -> Iterator[Line]:
    """A line for each method: likelihoods after READS, and where EM goes on to from the last."""
    rows = cell.rows(seed)
    everything = in_memory(rows)
    with stored(rows) as data:
        start = by_auto(cell, data, seed, 1)
        assert data.reads() == 1
        for method in methods:
            began = time.perf_counter()
            models = [_fitted(method, cell, data, start.params, seed, reads) for reads in READS]
            fitted = time.perf_counter()
            end = continued(everything, models[-1].params)
            yield {
                "method": method,
                "n": len(rows),
                "sample_rows": cell.sample_rows(len(rows)),
                "likelihoods": [log_likelihood(everything, models[0].params), end.start],
                "optimum": end.end,
                "inner_steps": models[-1].inner_steps,
                "rejected": models[-1].rejected,
                "passes": models[-1].passes,
                "continued_passes": end.passes,
                "seconds": [round(fitted - began, 2), round(time.perf_counter() - fitted, 2)],
            }


def _fitted(method: str, cell: Cell, data: Stored, start: MixtureParams, seed: int, reads: int) -> Fitted:
    if method == "auto":
        found = by_auto(cell, data, seed, reads)
    else:
        found = {"em": by_em, "anderson": by_anderson}[method](cell, data, start, reads)
    taken = data.reads()
    assert taken == reads == found.passes + 1, f"{method} read the store {taken} times, {reads} were meant"
    return found


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Of a cell and a method: gaps (2, seeds) after READS and what the optimum lacks (seeds,), in units of U."""

    cell: Cell
    method: str
    lines: list[Line]
    gaps: np.ndarray
    lacking: np.ndarray

    @property
    def medians(self) -> np.ndarray:
        """(2,) after READS; not below what an optimum is known to."""
        return np.maximum(np.median(self.gaps, axis=1), RESOLUTION / self.unit)

    @property
    def unit(self) -> float:
        return self.cell.unit(self.lines[0]["n"])

    @property
    def within(self) -> bool:
        return bool((self.medians <= LIMITS[self.cell.kind]).all())

    def __str__(self) -> str:
        first = self.lines[0]
        (four, six), (worst_four, worst_six) = np.median(self.gaps, axis=1), self.gaps.max(axis=1)
        line = (
            f"{self.cell.name:22} {first['n']:7,d} {self.cell.n_parameters:4d} {first['sample_rows']:6,d} "
            f"{self.unit:8.1e} {len(self.lines):5d}  {self.method:8}  {four:8.1e} {worst_four:8.1e}  "
            f"{six:8.1e} {worst_six:8.1e}  {np.median(self.lacking):8.1e} {self.lacking.max():8.1e} "
            f"{int((self.gaps[0] < 0).sum()):5d}"
        )
        if self.method != "auto":
            return line
        steps, rejected = (sum(line[name] for line in self.lines) for name in ("inner_steps", "rejected"))
        asked = "{:g} and {:g}".format(*LIMITS[self.cell.kind])
        return f"{line}  {steps / len(self.lines):5.0f} {rejected:8d}  {asked:>13} {'yes' if self.within else 'NO':>3}"


HEAD = (
    f"{'cell':22} {'n':>7} {'P':>4} {'m':>6} {'U':>8} {'seeds':>5}  {'method':8}  {'4 reads':>8} {'worst':>8}  "
    f"{'6 reads':>8} {'worst':>8}  {'lacking':>8} {'worst':>8} {'above':>5}  {'steps':>5} {'rejected':>8}  "
    f"{'asked':>13} met"
)


def summaries(cell: Cell, lines: list[Line]) -> list[Summary]:
    """One for each method, over the seeds that all methods are done with."""
    mine = {(line["method"], line["seed"]): line for line in lines if line["cell"] == cell.name}
    seeds = [s for s in sorted({s for _, s in mine}) if all((method, s) in mine for method in METHODS)]
    if not seeds:
        return []
    best = {
        s: max(max(mine[method, s]["optimum"], *mine[method, s]["likelihoods"]) for method in METHODS) for s in seeds
    }
    if cell.kind == "real":  # the same rows for every seed
        best = dict.fromkeys(seeds, max(best.values()))
    made = []
    for method in METHODS:
        of = [mine[method, s] for s in seeds]
        unit = cell.unit(of[0]["n"])
        optima = np.array([line["optimum"] for line in of])
        likelihoods = np.array([line["likelihoods"] for line in of]).T
        lacking = np.array([best[s] for s in seeds]) - optima
        made.append(Summary(cell, method, of, (optima - likelihoods) / unit, lacking / unit))
    return made


def verdicts(ours: list[Summary], others: list[list[Summary]]) -> list[str]:
    """What is said of all cells together. others: for each cell the summaries of the other methods."""
    total = len(ours)
    passes, rejected = (sum(line[name] for mine in ours for line in mine.lines) for name in ("passes", "rejected"))
    said = [
        f"within what is asked: {sum(mine.within for mine in ours)} of {total} cells",
        f"rejected reads: {rejected} of {passes} ({rejected / passes:.1%}), asked: at most {MOST_REJECTED:.0%}",
    ]
    better = np.array([np.min([other.medians for other in rest], axis=0) for rest in others])
    medians = np.array([mine.medians for mine in ours])
    floors = np.array([RESOLUTION / mine.unit for mine in ours])
    for reads, our, their in zip(READS, medians.T, better.T, strict=True):
        ratio = our / their
        near, below, same = (ratio <= LARGEST_RATIO).sum(), (our < their).sum(), (their <= floors).sum()
        said += [
            f"after {reads} reads our median is at most {LARGEST_RATIO} times the better of the other two in {near} of "
            f"{total} cells (asked: all), at most {ratio.max():.2f} times,",
            f"    below both in {below} (asked: {LEAST_CELLS:.0%}); in {same} the better one is no more than "
            f"{RESOLUTION:g} nats, which nothing can be below",
        ]
    return said


def main() -> None:
    arguments = parser(__doc__).parse_args()
    lines = measure(arguments, work, METHODS)
    print(HEAD)
    ours, others = [], []
    for cell in CELLS:
        found = summaries(cell, lines)
        for summary in found:
            print(summary)
        if found:
            ours.append(found[0])
            others.append(found[1:])
    if ours:
        print("\n".join(verdicts(ours, others)))
        took = np.array([line["seconds"] for line in lines])
        print(f"seconds a seed and method, median: fits {median(took[:, 0]):.1f}, continued {median(took[:, 1]):.1f}")


if __name__ == "__main__":
    main()
