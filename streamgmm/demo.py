"""The demo: rows with known truth in a zarr store, a fit of them, and how near it came. It knows no terminal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import streamgmm
from streamgmm.errors import ParameterError
from streamgmm.plotting import draw, save_picture
from streamgmm.prediction import create_array, is_array
from streamgmm.sources import uninterrupted
from streamgmm.summary import aligned, numbered_features, parameter_cells
from streamgmm.synthetic import Mixture, random_mixture

COMPONENTS, FEATURES, SEPARATION = 5, 4, 4.0
CHUNK_ROWS = 65_536
TOL = 1e-6
#: The attribute that tells a store written by the demo, which it may replace, from one that is somebody's.
MARK = "streamgmm-demo"


@dataclass(frozen=True)
class DemoFiles:
    """What the demo writes."""

    rows: Path
    model: Path
    picture: Path


def claim(directory: Path) -> DemoFiles:
    """The files of the demo, in a folder that is new, empty, or an earlier demo's; ParameterError otherwise."""
    files = DemoFiles(directory / "rows.zarr", directory / "model.sgmm", directory / "mixture.png")
    directory.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in (files.rows, files.model, files.picture) if path.exists()]
    if taken and not _is_demo(files.rows):
        raise ParameterError(
            f"{directory} holds {', '.join(taken)}, which the demo did not write. Give it another folder."
        )
    return files


@uninterrupted()
def _is_demo(store: Path) -> bool:
    return is_array(store) and MARK in zarr.open(str(store), mode="r").attrs


def known_mixture(seed: int) -> Mixture:
    """The truth that the rows are drawn from."""
    return random_mixture(COMPONENTS, FEATURES, SEPARATION, seed)


def new_store(path: Path, truth: Mixture, n_rows: int) -> Any:
    """An empty zarr array for n_rows rows of ``truth``, in place of an earlier demo's."""
    shutil.rmtree(path, ignore_errors=True)
    return create_array(
        path,
        (n_rows, FEATURES),
        (CHUNK_ROWS, FEATURES),
        np.float32,
        fill_value=np.nan,
        attributes={MARK: {"weights": truth.weights.tolist(), "means": truth.means.tolist()}},
    )


def fill(array: Any, truth: Mixture, seed: int, written: Callable[[int], None]) -> None:
    """Draw the rows of the store chunk by chunk, with no more than one in memory; ``written`` hears of each."""
    chunk_rows = array.chunks[0]
    for i, (rows, _) in enumerate(truth.chunks(array.shape[0], chunk_rows, seed)):
        with uninterrupted():
            array[i * chunk_rows : i * chunk_rows + len(rows)] = rows
        written(len(rows))


def fit(files: DemoFiles, seed: int) -> streamgmm.GaussianMixture:
    """A model fitted to the store, and saved."""
    model = streamgmm.GaussianMixture(COMPONENTS, tol=TOL, random_state=seed).fit(str(files.rows))
    model.save(files.model)
    return model


def matched(model: streamgmm.GaussianMixture, truth: Mixture) -> Mixture:
    """The fitted mixture, its components in the order of the true ones."""
    order = truth.match(model.means_)
    return Mixture(model.weights_[order], model.means_[order], model.covariances_[order])


def comparison(truth: Mixture, estimate: Mixture) -> str:
    """True beside fitted parameters, two lines a component."""
    pairs = zip(*(parameter_cells(m.weights, m.means, m.deviations) for m in (truth, estimate)), strict=True)
    table = [["#", "", "weight", *numbered_features(truth.means.shape[1])]]
    for j, (true, fitted) in enumerate(pairs):
        table += [[str(j), "true", *true], ["", "fitted", *fitted]]
    return aligned(table)


def verdict(truth: Mixture, estimate: Mixture, n_rows: int) -> str:
    """The largest difference between the two, beside what chance alone makes of so many rows."""
    means = np.abs(truth.means - estimate.means) / truth.deviations
    chance = 1.0 / np.sqrt(n_rows * truth.weights.min())
    return (
        f"Largest difference of a mean: {means.max():.4f} standard deviations (standard error of "
        f"the rarest component: {chance:.4f})."
    )


def draw_picture(files: DemoFiles, truth: Mixture, estimate: Mixture) -> None:
    """Write the picture of the first chunk's rows; MissingPackageError where there is no matplotlib."""
    with uninterrupted():
        array: Any = zarr.open(str(files.rows), mode="r")
        rows = np.asarray(array[: array.chunks[0]])
    model = streamgmm.GaussianMixture.from_parameters(estimate.weights, estimate.means, estimate.covariances)
    title = f"{len(truth.weights)} components fitted to {array.shape[0]:,} rows"
    save_picture(draw(rows, estimate, truth=truth, labels=model.predict(rows), title=title), files.picture)
