"""How often a start leads to the best optimum known: ours, each kind of start by itself, and scikit-learn's.

    python benchmarks/starts.py                                  # 40 seeds of four settings, some hours on one core
    python benchmarks/starts.py --seeds 5 --jobs 2 --results starts.jsonl

Every start is converged by EM on the same rows in memory; the optimum is the best of EM from the true components and of
all starts tried. Finished rows are kept in the file of ``--results``, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from sklearn.mixture import GaussianMixture as SklearnMixture

from streamgmm.covariance import FullCovariance
from streamgmm.errors import NumericalError
from streamgmm.executors import SerialExecutor
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
from streamgmm.start import best_start, find_start
from streamgmm.stats import Frame
from streamgmm.synthetic import recipe

REG_COVAR = 1e-6
#: Nats a row that a start may end below the optimum.
CLOSE = 1e-3
RESTARTS = 8
OURS = {1: "ours, n_init=1", RESTARTS: f"ours, n_init={RESTARTS}"}
KINDS = ("k-means++", "kmeans", "vq", "random_from_data", "random", "samples")
THEIRS, CONTINUED, TRUTH = "scikit-learn", "scikit-learn, converged", "true components"
WAYS = (*OURS.values(), *KINDS, THEIRS, CONTINUED, TRUTH)


class Setting(NamedTuple):
    """Rows of a kind, and the share of seeds that must come close."""

    name: str
    k: int
    d: int
    n: int
    separation: float
    eccentricity: float
    required: dict[int, float]


SETTINGS = (
    Setting("k=8 d=4 separation 2", 8, 4, 8_000, 2.0, 3.0, {1: 0.9, RESTARTS: 0.95}),
    Setting("k=8 d=4 separation 1", 8, 4, 8_000, 1.0, 3.0, {1: 0.6, RESTARTS: 0.9}),
    Setting("k=20 d=8 separation 1", 20, 8, 10_000, 1.0, 3.0, {1: 0.85, RESTARTS: 0.95}),
    Setting("k=16 d=4 separation 0.6, eccentric", 16, 4, 8_000, 0.6, 30.0, {1: 0.4, RESTARTS: 0.55}),
)


def sample_of(rows: np.ndarray, seed: int) -> Sample:
    d = rows.shape[1]
    frame = Frame(np.zeros(d), np.ones(d))
    return Sample.of(rows, np.ones(len(rows)), frame, SerialExecutor(), seed, len(rows), complete=True)


def of_labels(rows: np.ndarray, labels: np.ndarray, k: int) -> MixtureParams:
    weights = np.bincount(labels, minlength=k) / len(labels)
    means = np.stack([rows[labels == j].mean(axis=0) for j in range(k)])
    covariances = np.stack([np.cov(rows[labels == j].T, bias=True) for j in range(k)])
    return MixtureParams(weights, means, FullCovariance(covariances + REG_COVAR * np.eye(rows.shape[1])))


def converged(sample: Sample, starts: list[MixtureParams]) -> float:
    """Nats a row where the best of the starts ends; -inf where all of them degenerate."""
    try:
        return best_start(sample, starts, REG_COVAR).log_likelihood
    except NumericalError:
        return -np.inf


def scikit_learn(sample: Sample, k: int, seed: int) -> tuple[float, float]:
    """Nats a row of scikit-learn's default fit, and where EM ends that goes on from there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SklearnMixture(k, random_state=seed).fit(sample.rows)
    params = MixtureParams(model.weights_, model.means_, FullCovariance(model.covariances_))
    return float(model.score(sample.rows)), converged(sample, [params])


def tried(setting: Setting, seed: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """Nats a row where each way ends on the rows of a seed."""
    k = setting.k
    rows, labels = recipe(
        k, setting.d, setting.n, setting.separation, seed, eccentricity=setting.eccentricity, concentration=3.0
    )
    sample = sample_of(rows, seed)

    def start(kind: str, index: int) -> MixtureParams:
        return find_start(kind, sample, FullCovariance, k, seed, index, REG_COVAR)

    began = time.perf_counter()
    first = start("auto", 0)
    seconds = time.perf_counter() - began
    ended = {name: converged(sample, [start(name, 0)]) for name in kinds}
    ended[OURS[1]] = converged(sample, [first])
    ended[OURS[RESTARTS]] = converged(sample, [first, *(start("auto", index) for index in range(1, RESTARTS))])
    ended[THEIRS], ended[CONTINUED] = scikit_learn(sample, k, seed)
    ended[TRUTH] = converged(sample, [of_labels(rows, labels, k)])
    return {**ended, "seconds": seconds}


def finished(path: Path | None) -> dict[tuple[str, int], dict[str, float]]:
    """What the file holds, by setting and seed."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["setting"], row["seed"]): row["ended"] for row in rows}


def run(seeds: int, jobs: int, path: Path | None, chosen: tuple[Setting, ...]) -> dict[tuple[str, int], Any]:
    done = finished(path)
    left = [(setting, seed) for seed in range(seeds) for setting in chosen if (setting.name, seed) not in done]
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(tried, setting, seed, KINDS): (setting.name, seed) for setting, seed in left}
        for future in as_completed(waiting):
            name, seed = waiting[future]
            done[name, seed] = future.result()
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"setting": name, "seed": seed, "ended": done[name, seed]}) + "\n")
    return done


def shares(done: dict[tuple[str, int], Any], seeds: int, setting: Setting) -> dict[str, float]:
    """The share of seeds that come close to the optimum, by the way that leads there."""
    rows = [done[setting.name, seed] for seed in range(seeds)]
    best = [max(value for name, value in row.items() if name != "seconds") for row in rows]
    return {
        name: float(np.mean([row[name] > top - CLOSE for row, top in zip(rows, best, strict=True)])) for name in WAYS
    }


def table(done: dict[tuple[str, int], Any], seeds: int, chosen: tuple[Setting, ...]) -> str:
    """The shares, and for ours the one that is required."""
    lines = [f"share of {seeds} seeds within {CLOSE:g} nats a row of the optimum"]
    lines.append(" ".join([f"{'':>34}", *(f"{name:>24}" for name in WAYS)]))
    for setting in chosen:
        required = {OURS[n_init]: least for n_init, least in setting.required.items()}
        cells = [
            f"{share:.2f}" + (f" (at least {required[name]:.2f})" if name in required else "")
            for name, share in shares(done, seeds, setting).items()
        ]
        lines.append(" ".join([f"{setting.name:>34}", *(f"{cell:>24}" for cell in cells)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--results", type=Path, help="a file that keeps finished rows, one JSON object a line")
    arguments = parser.parse_args()
    done = run(arguments.seeds, arguments.jobs, arguments.results, SETTINGS)
    print(table(done, arguments.seeds, SETTINGS))


if __name__ == "__main__":
    main()
