"""From a zarr store to a mixture: our default fit, and what scikit-learn needs to come as far with the rows in memory.

    python benchmarks/against_sklearn.py --results sklearn.jsonl                    # 2,000,000 rows: an hour or more
    python benchmarks/against_sklearn.py --results short.jsonl --rows 50000         # a short form

Rows of a known mixture (d = 8, k = 16, separation 1). Timed are, one after the other and each with all cores: our fit
with its defaults from the store; scikit-learn's fit of the same rows in memory with its defaults; and scikit-learn with
tol=1e-7 and max_iter=2000 until its lower bound first reaches the likelihood of our model minus U = P / 2n, the
statistical error of the exact estimate, or until it stops. scikit-learn makes one start, k-means, which counts; what it
needs to read the store does not. Spark's fit with its defaults stands beside them where pyspark is installed.

Prints the seconds and the mean log-likelihood (nats a row) of each, their ratio and difference to ours, and whether
these are within what is asked: ours in at most 1/20 of the time until scikit-learn is as good, in at most the time of
its default fit, and better than that. Every result is stored as it comes, every iteration of the long fit too: a run
that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zarr
from results import Line, append, read
from sklearn.mixture import GaussianMixture as SklearnMixture

from streamgmm import GaussianMixture
from streamgmm.synthetic import recipe

D, K, SEPARATION, SEED = 8, 16, 1.0, 0
N = 2_000_000
CHUNK_ROWS = 65_536
TOL, MOST_ITERATIONS = 1e-7, 2000
#: Our time over that until scikit-learn is as good, and over that of its default fit.
LARGEST_RATIOS = {"until as good": 1 / 20, "sklearn": 1.0}


class Timed(SklearnMixture):
    """scikit-learn's mixture, which calls ``told(bound)`` after each iteration."""

    told: Callable[[float], None]

    def _compute_lower_bound(self, log_resp: Any, log_prob_norm: Any) -> Any:
        bound = super()._compute_lower_bound(log_resp, log_prob_norm)
        self.told(float(bound))
        return bound


@dataclass(frozen=True, eq=False)
class Kept:
    """A fit of scikit-learn after some iterations. arrays: the attributes that it goes on from."""

    iteration: int
    seconds: float
    bound: float
    arrays: dict[str, np.ndarray]

    NAMES = ("weights_", "means_", "covariances_", "precisions_cholesky_")

    @classmethod
    def read(cls, path: Path) -> Kept | None:
        if not path.exists():
            return None
        with np.load(path) as file:
            arrays = {name: file[name] for name in cls.NAMES}
            return cls(int(file["iteration"]), float(file["seconds"]), float(file["bound"]), arrays)

    def write(self, path: Path) -> None:
        beside = path.with_name(f"{path.name}.part.npz")
        np.savez(beside, iteration=self.iteration, seconds=self.seconds, bound=self.bound, **self.arrays)
        beside.replace(path)

    def give_to(self, model: SklearnMixture) -> None:
        """With warm_start scikit-learn makes no start and goes on, as if it had not stopped."""
        for name, value in self.arrays.items():
            setattr(model, name, value)
        model.lower_bound_, model.converged_, model.warm_start = self.bound, False, True


# -- what is timed -------------------------------------------------------------------------------------------------


def ours(rows: np.ndarray) -> Line:
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.zarr")
        zarr.create_array(path, data=rows, chunks=(CHUNK_ROWS, D))
        began = time.perf_counter()
        model = GaussianMixture(K, random_state=SEED).fit(path)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "likelihood": model.score(rows), "reads": model.n_passes_}


def sklearn(rows: np.ndarray) -> Line:
    began = time.perf_counter()
    model = SklearnMixture(K, random_state=SEED).fit(rows)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "likelihood": float(model.score(rows)), "iterations": model.n_iter_}


def until_as_good(rows: np.ndarray, target: float, path: Path) -> Line:
    """Goes on from the last iteration that was kept, if there is one. reached: whether it came to the target."""
    kept = first = Kept.read(path.with_suffix(".npz"))
    done = 0 if first is None else first.iteration
    model = Timed(K, tol=TOL, max_iter=MOST_ITERATIONS - done, random_state=SEED)
    seconds, began = 0.0, 0.0
    if first is not None:
        first.give_to(model)
        seconds = first.seconds

    def told(bound: float) -> None:
        nonlocal kept, seconds, began, done
        seconds += time.perf_counter() - began
        done += 1
        kept = Kept(done, seconds, bound, {name: getattr(model, name) for name in Kept.NAMES})
        kept.write(path.with_suffix(".npz"))
        append(path, {"what": "iteration", "iteration": done, "seconds": seconds, "bound": bound})
        if bound >= target:
            model.tol = np.inf  # the next comparison ends the fit
        began = time.perf_counter()  # to keep all that is not scikit-learn's time

    model.told = told
    if (first is None or first.bound < target) and model.max_iter:
        began = time.perf_counter()
        model.fit(rows)
    assert kept is not None
    return {
        "seconds": kept.seconds,
        "likelihood": kept.bound,
        "iterations": kept.iteration,
        "reached": kept.bound >= target,
    }


def spark(rows: np.ndarray) -> Line:
    """The fit alone, of rows that are cached in Spark's memory."""
    import pandas as pd
    from pyspark.ml.clustering import GaussianMixture as SparkMixture
    from pyspark.ml.feature import VectorAssembler
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[*]").config("spark.driver.memory", "4g").getOrCreate()
    try:
        names = [f"x{j}" for j in range(D)]
        with TemporaryDirectory() as folder:
            file = str(Path(folder, "rows.csv"))
            pd.DataFrame(rows, columns=names).to_csv(file, index=False)
            table = session.read.csv(file, header=True, inferSchema=True)
            table = VectorAssembler(inputCols=names, outputCol="features").transform(table).select("features").cache()
            table.count()
            began = time.perf_counter()
            model = SparkMixture(k=K, seed=SEED).fit(table)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "likelihood": model.summary.logLikelihood / len(rows)}
    finally:
        session.stop()


# -- the walk ------------------------------------------------------------------------------------------------------


def measured(path: Path, what: str, measure: Callable[[], Line]) -> Line:
    """The stored result, or one that is measured now and stored."""
    for line in read(path):
        if line["what"] == what:
            return line
    line = {"what": what, **measure()}
    append(path, line)
    return line


def report(found: dict[str, Line], unit: float) -> list[str]:
    mine = found["ours"]
    said = [f"{'':14} {'seconds':>9} {'ours over it':>12}  {'likelihood':>12} {'ours minus it':>13}"]
    for what, line in found.items():
        ratio, higher = mine["seconds"] / line["seconds"], mine["likelihood"] - line["likelihood"]
        limit = LARGEST_RATIOS.get(what)
        met = limit is not None and ratio <= limit and (what != "sklearn" or higher > 0)
        asked = "" if limit is None else f"  asked: at most {limit:g}{'' if met else ', NOT met'}"
        said.append(f"{what:14} {line['seconds']:9.1f} {ratio:12.4f}  {line['likelihood']:12.6f} {higher:13.2e}{asked}")
    long = found["until as good"]
    how = "reached our likelihood minus U" if long["reached"] else "stopped by itself below our likelihood minus U"
    said.append(f"U = {unit:.1e}; our reads: {mine['reads']}; scikit-learn {how}")
    said.append(f"after {long['iterations']} iterations; its default fit ended after {found['sklearn']['iterations']}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines, one for one number of rows")
    parser.add_argument("--rows", type=int, default=N)
    arguments = parser.parse_args()
    n, path = arguments.rows, arguments.results
    if measured(path, "rows", lambda: {"rows": n})["rows"] != n:
        raise SystemExit(f"{path} holds results of another number of rows. Name another file.")
    rows, _ = recipe(K, D, n, SEPARATION, SEED)
    unit = (K * (1 + D + D * (D + 1) // 2) - 1) / (2 * n)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's default stops before it converges
        found["ours"] = measured(path, "ours", lambda: ours(rows))
        found["sklearn"] = measured(path, "sklearn", lambda: sklearn(rows))
        if importlib.util.find_spec("pyspark"):
            found["Spark"] = measured(path, "Spark", lambda: spark(rows))
        target = found["ours"]["likelihood"] - unit
        found["until as good"] = measured(path, "until as good", lambda: until_as_good(rows, target, path))
    print(f"{n:,} rows, d = {D}, k = {K}, separation {SEPARATION:g}")
    print("\n".join(report(found, unit)))
    if "Spark" not in found:
        print("Spark: absent")


if __name__ == "__main__":
    main()
