"""One implementation of EM in a process of its own, told by lines on its standard input; see benchmarks/peers.py.

    python peer_worker.py PEER FOLDER STRUCTURE THREADS

FOLDER holds rows.npy (n, d) and means.npy (k, d): the start has equal weights and unit covariances. A line with a
number of iterations is answered by one with the seconds, the iterations that were made, and the mean log-likelihood in
nats that entered the last one. It imports nothing that stands beside it, for each peer has an environment of its own.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: Runs so many iterations; returns how many it made and the mean log-likelihood that entered the last one.
Run = Callable[[int], tuple[int, float]]


def unit_covariances(k: int, d: int, structure: str) -> Any:
    return {"full": np.stack([np.eye(d)] * k), "tied": np.eye(d), "diag": np.ones((k, d)), "spherical": np.ones(k)}[
        structure
    ]


def _estimator(model: Any, rows: np.ndarray, means: np.ndarray, structure: str) -> Run:
    """scikit-learn's interface, which is ours as well."""
    k, d = means.shape
    start = {
        "weights_init": np.full(k, 1.0 / k),
        "means_init": means,
        "precisions_init": unit_covariances(k, d, structure),
    }

    def run(iterations: int) -> tuple[int, float]:
        fitted = model(k, covariance_type=structure, tol=0.0, max_iter=iterations, **start).fit(rows)
        return fitted.n_iter_, float(fitted.lower_bound_)

    return run


def streamgmm(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    from functools import partial

    import dask

    from streamgmm import GaussianMixture

    dask.config.set(scheduler="threads", num_workers=threads)
    return _estimator(partial(GaussianMixture, solver="em"), rows, means, structure)


def sklearn(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    from sklearn.mixture import GaussianMixture

    return _estimator(GaussianMixture, rows, means, structure)


def onedal(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    import daal4py

    daal4py.daalinit(threads)
    k, d = means.shape
    weights, covariances = np.full((1, k), 1.0 / k), list(unit_covariances(k, d, "full"))

    def run(iterations: int) -> tuple[int, float]:
        algorithm = daal4py.em_gmm(k, maxIterations=iterations, accuracyThreshold=0.0)
        found = algorithm.compute(rows, weights, means, covariances)
        return int(found.nIterations[0, 0]), float(found.goalFunction[0, 0]) / len(rows)

    return run


def pomegranate(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    torch.set_num_threads(threads)
    k, d = means.shape
    data, covariances = torch.as_tensor(rows), unit_covariances(k, d, structure)

    def run(iterations: int) -> tuple[int, float]:
        components = [Normal(*start, covariance_type=structure) for start in zip(means, covariances, strict=True)]
        model = GeneralMixtureModel(components, priors=np.full(k, 1.0 / k), check_data=False)
        for _ in range(iterations):  # what its fit does, which keeps the likelihood to itself
            likelihood = model.summarize(data)
            model.from_summaries()
        return iterations, float(likelihood) / len(rows)

    return run


def gmmx(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    """Single precision, for it refuses others; jax takes all cores whatever is asked of it."""
    import jax
    from gmmx import EMFitter, GaussianMixtureModelJax

    k, d = means.shape
    fitter = EMFitter()
    data, *initial = (
        jax.numpy.asarray(values, dtype=np.float32)
        for values in (rows, means, unit_covariances(k, d, structure), np.full(k, 1.0 / k))
    )
    start = GaussianMixtureModelJax.from_squeezed(*initial, structure)

    @jax.jit
    def step(data: Any, model: Any) -> tuple[Any, Any]:  # what its fit does, which is compiled anew for each max_iter
        likelihood, log_resp = fitter.e_step(data, model)
        return likelihood, fitter.m_step(data, model, log_resp)

    def run(iterations: int) -> tuple[int, float]:
        model = start
        for _ in range(iterations):
            likelihood, model = jax.block_until_ready(step(data, model))
        return iterations, float(likelihood)

    return run


def spark(rows: np.ndarray, means: np.ndarray, structure: str, threads: int) -> Run:
    """Its interface of RDDs, the only one that takes a start; it tells no likelihood."""
    from types import SimpleNamespace

    from pyspark.mllib.clustering import GaussianMixture
    from pyspark.mllib.linalg import DenseMatrix, DenseVector
    from pyspark.sql import SparkSession

    k, d = means.shape
    settings = {"spark.driver.memory": "8g", "spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
    session = SparkSession.builder.master(f"local[{threads}]").config(map=settings).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    table = session.sparkContext.parallelize(rows, threads).map(DenseVector).cache()
    covariances = [DenseMatrix(d, d, matrix.ravel()) for matrix in unit_covariances(k, d, structure)]
    gaussians = [SimpleNamespace(mu=DenseVector(mean), sigma=of) for mean, of in zip(means, covariances, strict=True)]
    start = SimpleNamespace(k=k, weights=[1.0 / k] * k, gaussians=gaussians)

    def run(iterations: int) -> tuple[int, float]:
        GaussianMixture.train(table, k, convergenceTol=0.0, maxIterations=iterations, seed=0, initialModel=start)
        return iterations, np.nan

    return run


PEERS = {
    "streamgmm": streamgmm,
    "scikit-learn": sklearn,
    "oneDAL": onedal,
    "pomegranate": pomegranate,
    "gmmx": gmmx,
    "Spark": spark,
}


def main() -> None:
    peer, folder, structure, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    warnings.simplefilter("ignore")  # a few iterations do not converge, and need not
    run = PEERS[peer](np.load(folder / "rows.npy"), np.load(folder / "means.npy"), structure, threads)
    for line in sys.stdin:
        began = time.perf_counter()
        made, likelihood = run(int(line))
        print(time.perf_counter() - began, made, likelihood, flush=True)


if __name__ == "__main__":
    main()
